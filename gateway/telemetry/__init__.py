"""The gateway's logs and metrics, and the page of everybody's. Knows no request's content."""
