"""A matrix that rows are multiplied with again and again. Torch and kernels; knows nothing of what the product means.

On a CPU, bf16 weights are packed once into the blocks that a kernel reads: one of ours (matmul.py) or oneDNN's. A
packed matrix is a copy, and each kernel has a layout of its own, so one kernel serves all numbers of rows. Elsewhere,
and in fp32, it is `F.linear`. Weights of 8 and 4 bits are multiplied as they are for rows of bf16 on a CPU
(quantized_matmul.py), and on a GPU that Triton compiles for (gpu/products.py); elsewhere they are widened. Plain ones
are multiplied by Triton where a row is to have the same bits in any batch: nobody knows what that costs on a card.

Of oneDNN's few rows four are the fastest: the sums of one row wait for each other, and memory waits for them. So up to
three are padded with copies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.compiled import quantized_matmul
from experts_service.kernels.compiled.matmul import Panels, multiply, multiply_task
from experts_service.kernels.compiled.quantized_matmul import QuantizedPanels, is_multiplied_here
from experts_service.kernels.compiled.routine import Task
from experts_service.kernels.compiled.tile import PAIR
from experts_service.kernels.gpu import products
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.gpu.matrices import Matrices, stays_small
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.quantization.weight import Weight, dense

_ROWS_HINT = 16  # what oneDNN picks the blocks for; they serve any number of rows
_FASTEST_ROWS = 4


class Linear:
    """y = x Wᵀ without bias."""

    def __init__(self, weight: Weight, kernel: Kernel | None = None) -> None:
        """`weight` [out, in]; a packed one is a copy, the caller may drop its own."""
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self._kernel = kernel_for(weight.dtype, weight.device, kernel)
        self._quantized, self._matrices = None, None
        if self._kernel is Kernel.TRITON or (stays_small(weight) and compiles_for(weight.device)):
            self._matrices = Matrices.pack([(weight,)])
            return
        if is_multiplied_here(weight):
            self._quantized = QuantizedPanels.pack(weight, arithmetic=self._kernel.own_arithmetic)
            return
        weight = dense(weight)
        if self._kernel.is_own:
            self._panels = Panels.pack(weight)
        elif self._kernel is Kernel.ONEDNN:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        else:
            self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [R, in] → [R, out]."""
        if self._matrices is not None:
            return products.multiply(x, self._matrices)
        if self._quantized is not None:
            y = x.new_empty(len(x), self.out_features)
            quantized_matmul.multiply(x, (self._quantized,), (len(x),), y)
            return y
        if self._kernel.is_own:
            y = x.new_empty(len(x), self.out_features)
            multiply(self._kernel.arithmetic, x, self._panels, y)
            return y
        if self._kernel is Kernel.TORCH:
            return F.linear(x, self._weight)
        if not len(x):
            return x.new_empty(0, self.out_features)
        padded = torch.cat((x,) * math.ceil(_FASTEST_ROWS / len(x))) if len(x) < _FASTEST_ROWS else x
        of_padded: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self._weight, None, "none", [], "")
        return of_padded[: len(x)]

    @property
    def has_tasks(self) -> bool:
        """Whether `tasks` can be asked for: kernels of our own multiply rows as they come."""
        if self._quantized is not None:
            return self._quantized.columns is None
        return self._kernel.is_own and self.in_features % PAIR == 0

    @property
    def integers(self) -> int:
        """How many int32 its tasks need for a row."""
        return 0 if self._quantized is None else self._quantized.row_words

    def tasks(self, x: Tensor, y: Tensor, integers: Tensor) -> list[Task]:
        """What writes `y` [R, out], of `x` [R, in], for a chain. Neither has gaps, and all stay where they are.

        Nobody else needs `integers` meanwhile.
        """
        if self._quantized is not None:
            return quantized_matmul.tasks(x, (self._quantized,), (x.shape[0],), y, integers=integers)
        return [multiply_task(self._kernel.arithmetic, x, self._panels, y)]
