"""The HTTP door: one app, its guards, bodies, errors and streams. Knows no gRPC, no Serve."""
