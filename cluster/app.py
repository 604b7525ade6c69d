"""Composes the Serve applications."""
