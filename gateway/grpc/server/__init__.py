"""The gRPC server that stands in for Serve's: who is read at all, and how much.

Knows bytes and keys; knows no model.
"""
