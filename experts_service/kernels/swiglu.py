"""A feed-forward network of the family: an expert's in one layer, or a dense layer's. Torch only; knows no names.

Formula and rounding are those of transformers: w2(silu(w1 x) * (w3 x)). Fused, w1 and w3 are one matmul, which several
threads or a GPU do sooner; one thread of a CPU does two sooner: with packed weights, by 7 to 16 % of an expert's
time, for 1 and 4 rows of the bench model.

Shapes: R rows, D hidden size, F intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.linear import Linear


class SwiGLU:
    """Its matrices, packed once."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor, *, fused: bool) -> None:
        """`w1` and `w3` [F, D], `w2` [D, F]."""
        self._w1_w3 = (Linear(torch.cat((w1, w3))),) if fused else (Linear(w1), Linear(w3))  # D → 2F, or D → F each
        self._w2 = Linear(w2)  # F → D

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows` [R, D] → [R, D]."""
        padded = self._w1_w3[0].pad(rows)  # [P, D], P ≥ R: once for all three
        outputs = [matrix(padded) for matrix in self._w1_w3]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)  # [P, F], [P, F]
        return self._w2(F.silu(gate) * up)[: len(rows)]
