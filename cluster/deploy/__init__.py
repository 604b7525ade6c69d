"""Composes coordinator, experts and gateway into Serve applications.

Knows deployments and their options; knows no step and no request.
"""
