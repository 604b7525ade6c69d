"""Lanes as both sides see them: addresses, secret, handshake, frames. Knows bytes; knows no rows."""
