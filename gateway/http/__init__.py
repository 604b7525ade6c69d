"""The HTTP door: one app, authentication, bodies, errors and streams. Knows no gRPC, no Serve."""
