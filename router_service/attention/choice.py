"""Which attention backend serves a model on a device. Knows them all; runs none."""

from __future__ import annotations

import logging

import torch

from cluster.checkpoint.architecture import Architecture
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.tile import FMA
from experts_service.kernels.gpu.launch import can_compile
from experts_service.kernels.kernel import Kernel
from router_service.attention.backend import AttentionBackend
from router_service.attention.reference import ReferenceAttention

logger = logging.getLogger(__name__)

OLDEST_CARD = (8, 0)  # compute capability: what Triton compiles for


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
    if device.type == "cuda":
        if (backend := _on_gpu(architecture, block_size, dtype, device)) is not None:
            return backend
        # cuDNN's makes a plan for every new length, 23 ms and more a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return ReferenceAttention(architecture, block_size=block_size, dtype=dtype, device=device, of_codes=of_codes)


def _on_gpu(
    architecture: Architecture, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend | None:
    """Kernels of our own; None, and a warning, where they do not run."""
    if not can_compile():
        _warn("Triton or the C compiler that it needs is missing: install triton (torch for CUDA brings it) and gcc")
        return None
    from router_service.attention.triton_paged import TritonAttention, is_served

    if not is_served(architecture, dtype):
        _warn("its kernels take heads of at most 256 numbers, and at most 64 of them on one key-value head, or 32 KiB")
        return None
    if torch.cuda.get_device_capability(device) < OLDEST_CARD:
        _warn("its kernels need a card of compute capability 8.0 or later")
        return None
    backend = TritonAttention(architecture, block_size=block_size, dtype=dtype, device=device)
    backend.warm_up()
    return backend


def _warn(why: str) -> None:
    logger.warning("attention on the GPU copies the whole context in every step, which is slow: %s", why)
