"""A feed-forward network of the family: an expert's in one layer, or a dense layer's. Torch only; knows no names.

Formula and rounding are those of transformers: w2(silu(w1 x) * (w3 x)), here with w1 and w3 in one matmul.

Shapes: R rows, D hidden size, F intermediate size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from experts_service.linear import Linear


class SwiGLU:
    """Two matrices, packed once."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        """`w13` [2F, D], the rows of w1 before those of w3; `w2` [D, F]."""
        self._w13 = Linear(w13)  # D → 2F
        self._w2 = Linear(w2)  # F → D

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows` [R, D] → [R, D]."""
        gate, up = self._w13(rows).chunk(2, dim=-1)  # [R, F], [R, F]
        return self._w2(F.silu(gate) * up)
