"""The learned router of one layer: which experts each token goes to, with what weight. Knows no expert itself."""

from __future__ import annotations

import torch

from experts_service.kernels.kernel import Kernel
from experts_service.kernels.linear import Linear
from experts_service.quantization.weight import Weight
from router_service.rows import choose


class Gate:
    """Top-k softmax gate, as Mixtral's reference computes it: softmax over all experts in fp32, top k, renormalised.

    Source: Mixtral of Experts, arXiv 2401.04088, section 2.1.

    The product is rounded to the model's dtype.
    """

    def __init__(self, weight: Weight, top_k: int, kernel: Kernel | None = None) -> None:
        """`weight` [E, D]. `kernel` multiplies bf16 on a CPU."""
        self.scores = Linear(weight, kernel)  # D → E
        self.top_k = top_k

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and expert indices, both [T, K], most likely first, for `rows` [T, D]."""
        return choose(self.scores(rows), self.top_k)
