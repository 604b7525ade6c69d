"""The doors: HTTP and gRPC, validation, tokens to text. Never imports torch."""
