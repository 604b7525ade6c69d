"""The learned router of one layer: which experts each token goes to, with what weight. Knows no expert itself."""

from __future__ import annotations

import torch

from cluster.checkpoint.architecture import GateSpec
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.linear import Linear
from experts_service.quantization.weight import Weight
from router_service.rows import choose


class Gate:
    """Top-k softmax gate, as each family's reference computes it: scores rounded to the model's dtype, softmax in fp32.

    Mixtral's is that of Mixtral of Experts, arXiv 2401.04088, section 2.1.
    """

    def __init__(self, weight: Weight, top_k: int, kernel: Kernel | None = None, spec: GateSpec | None = None) -> None:
        """`weight` [E, D]. `kernel` multiplies bf16 on a CPU. `spec`: how the chosen are weighed; None: as Mixtral."""
        self.scores = Linear(weight, kernel)  # D → E
        self.top_k = top_k
        self.spec = spec or GateSpec()

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and expert indices, both [T, K], most likely first, for `rows` [T, D]."""
        scores = self.scores(rows)  # [T, E]
        if self.spec.softmax == "chosen":
            chosen, experts = scores.float().topk(self.top_k, dim=-1)
            weights = chosen.softmax(dim=-1)
        else:
            weights, experts = choose(scores, self.top_k, renormalised=self.spec.renormalised)
        if self.spec.rounded:
            weights = weights.to(scores.dtype).float()
        return weights, experts

    @property
    def is_chained(self) -> bool:
        """Whether `rows.Choice` says the same."""
        return self.spec == GateSpec()
