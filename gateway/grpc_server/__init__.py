"""What stands around Serve's gRPC servers, before any of our RPCs. Knows metadata, bytes and peers; no field.

connection ─▶ options (server) ─▶ gate: key, then the message, bounded ─▶ Serve ─▶ GrpcDoor
                                    └── trailers: what goes back fits into HAProxy's buffer
"""
