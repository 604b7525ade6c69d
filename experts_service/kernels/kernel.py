"""What can multiply bf16 on this CPU, and what does on a GPU. Knows what each kernel needs; knows no layer."""

from __future__ import annotations

from enum import StrEnum

import torch

from experts_service.kernels.compiled import tile
from experts_service.kernels.compiled.jit import AVAILABLE


class Kernel(StrEnum):
    """What multiplies rows with weights. Named as in the configuration."""

    DOT = "dot"  # our own, on the CPU's dot product of bf16 pairs
    FMA = "fma"  # our own, on widened numbers: the same bits on every CPU
    ONEDNN = "onednn"  # oneDNN's packed weights
    TORCH = "torch"  # torch's linear on the plain layout
    TRITON = "triton"  # our own, of GPUs

    @property
    def is_own(self) -> bool:
        """One of ours, of a CPU."""
        return self in (Kernel.DOT, Kernel.FMA)

    @property
    def batch_invariant(self) -> bool:
        """One of ours: the bits of a row are the same whatever other rows there are."""
        return self.is_own or self is Kernel.TRITON

    @property
    def arithmetic(self) -> int:
        """Of one of ours, for tile.py."""
        return {Kernel.DOT: tile.DOT, Kernel.FMA: tile.FMA}[self]

    @property
    def own_arithmetic(self) -> int | None:
        """The same; None: it is a library's."""
        return self.arithmetic if self.is_own else None


def available() -> tuple[Kernel, ...]:
    """What this CPU and this installation can run in bf16, the one first that is fastest as a rule."""
    kernels = [Kernel.DOT] if tile.HAS_DOT else []
    if AVAILABLE:
        kernels.append(Kernel.FMA)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kernels.append(Kernel.ONEDNN)
    return (*kernels, Kernel.TORCH)


def kernel_for(dtype: torch.dtype, device: torch.device, chosen: Kernel | None) -> Kernel:
    """`chosen` where there is a choice: in bf16 on a CPU, and of Triton; None: the first that is available."""
    if chosen is Kernel.TRITON:
        return chosen
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return Kernel.TORCH
    return chosen or available()[0]
