"""`manta chat`: a conversation in the terminal. Knows the server's HTTP API only."""
