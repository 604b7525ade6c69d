"""Checkpoints on disk: their files, configurations, layouts and tensors' places.

Knows no torch, no Ray and no placement.
"""
