"""A matrix that rows are multiplied with again and again. Torch only; knows nothing of what the product means.

On a CPU, bf16 weights are packed once into the blocks that its vector or matrix units read (oneDNN). For few rows that
is about 1.7 times faster than `F.linear`, which works on the plain layout. Elsewhere, and in fp32, it is `F.linear`.

Of few rows, four are the fastest: the sums of one row wait for each other, and memory waits for them. On two cores with
AVX-512 bf16, one thread each, an expert's matrices of the bench model were read at 14.6 GB/s by one row, 13 by two, 17
by three, 18.5 by four and 13 by eight. So up to three rows are padded with copies: a step of one sequence took 0.88 of
the time (12 pairs of runs in turn, experts and attention in one process).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_HINT = 16  # what oneDNN picks the blocks for; they serve any number of rows
_FASTEST_ROWS = 4


class Linear:
    """y = x Wᵀ without bias."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in]; a packed one is a copy, the caller may drop its own."""
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self._packed = _packs(self.dtype, self.device)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [R, in] → [R, out]."""
        if not self._packed:
            return F.linear(x, self._weight)
        if not len(x):
            return x.new_empty(0, self.out_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(self.pad(x), self._weight, None, "none", [], "")
        return y if len(y) == len(x) else y[: len(x)]

    def pad(self, x: Tensor) -> Tensor:
        """`x` [R, in] with copies of it below, if more rows are faster. For those who use `x` more than once."""
        if self._packed and 0 < len(x) < _FASTEST_ROWS:
            return torch.cat((x,) * math.ceil(_FASTEST_ROWS / len(x)))
        return x


def linear_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies there, as benchmarks call it."""
    return "oneDNN packed bf16" if _packs(dtype, device) else "F.linear"


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
