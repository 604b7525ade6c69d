"""Which attention backend serves a model on a device. Knows them all; runs none."""

from __future__ import annotations

import torch

from cluster.checkpoint.architecture import Architecture
from router_service.attention.backend import AttentionBackend
from router_service.attention.reference import ReferenceAttention


def attention_backend(
    architecture: Architecture, *, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The fastest that can serve this model here."""
    return ReferenceAttention(architecture, block_size=block_size, dtype=dtype, device=device)
