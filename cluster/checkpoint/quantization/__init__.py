"""Quantised checkpoints: what `quantization_config` says, and which tensors a matrix is stored in.

Knows names, dtypes and shapes; computes no weight. How codes are unpacked is known in `experts_service.quantization`.
"""
