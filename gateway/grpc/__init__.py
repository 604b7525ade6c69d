"""The gRPC door: one servicer, authentication, messages and errors. Shares fields and validator with HTTP."""
