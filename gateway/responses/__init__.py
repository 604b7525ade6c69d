"""The Responses API: its fields, its items, its events. Knows no HTTP and no engine."""
