"""Which attention backend serves a model on a device. Knows them all; runs none."""

from __future__ import annotations

import torch

from cluster.checkpoint.architecture import Architecture
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.tile import FMA
from experts_service.kernels.kernel import Kernel
from router_service.attention.backend import AttentionBackend
from router_service.attention.reference import ReferenceAttention


def attention_backend(
    architecture: Architecture,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel | None = None,
    of_codes: bool = False,
) -> AttentionBackend:
    """The fastest that can serve this model here. With `kernel` FMA its bits are the same on every CPU, as there.

    `of_codes`: keys and values are kept in 8 bits, which is for CPUs.
    """
    if AVAILABLE:
        from router_service.attention.paged import BEST, PagedAttention, is_served, warm_up

        if is_served(architecture, block_size, dtype, device, of_codes=of_codes):
            arithmetic = FMA if kernel is Kernel.FMA else BEST
            warm_up(dtype, arithmetic, of_codes=of_codes)
            return PagedAttention(architecture, block_size=block_size, arithmetic=arithmetic, of_codes=of_codes)
    if device.type == "cuda":  # torch imports its compiler for this one, which takes a second
        from router_service.attention import varlen

        if varlen.is_served(architecture, block_size, dtype, device):
            return varlen.VarlenAttention(architecture, device=device)
        # cuDNN's makes a plan for every new length, 23 ms and more a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return ReferenceAttention(architecture, block_size=block_size, dtype=dtype, device=device, of_codes=of_codes)
