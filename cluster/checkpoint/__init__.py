"""Checkpoints on disk: their configurations, their tensors' places, and how both are written.

Knows no torch, no Ray and no placement.
"""
