"""Weights as small numbers times scales. Knows tensors; knows no checkpoint, no layer and no kernel."""
