"""The gRPC door: one servicer, its guards, messages and errors. Shares fields and validator with HTTP."""
