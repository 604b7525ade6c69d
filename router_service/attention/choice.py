"""Which attention backend serves a model on a device. Knows them all; runs none."""

from __future__ import annotations

import torch

from cluster.checkpoint.architecture import Architecture
from experts_service.kernels.jit import AVAILABLE
from router_service.attention.backend import AttentionBackend
from router_service.attention.reference import ReferenceAttention


def attention_backend(
    architecture: Architecture, *, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The fastest that can serve this model here."""
    if AVAILABLE:
        from router_service.attention.paged import PagedAttention, is_served, warm_up

        if is_served(architecture, block_size, dtype, device):
            warm_up(dtype)
            return PagedAttention(architecture, block_size=block_size)
    if device.type == "cuda":  # torch imports its compiler for this one, which takes a second
        from router_service.attention import varlen

        if varlen.is_served(architecture, block_size, dtype, device):
            return varlen.VarlenAttention(architecture, device=device)
    return ReferenceAttention(architecture, block_size=block_size, dtype=dtype, device=device)
