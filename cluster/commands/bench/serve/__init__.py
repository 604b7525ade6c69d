"""`manta bench serve`: load on a running server over HTTP or gRPC. Knows no engine."""
