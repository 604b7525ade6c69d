"""The learned router of one layer: which experts each token goes to, with what weight. Knows no expert itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Gate:
    """Top-k softmax gate, as Mixtral's reference computes it: softmax over all experts in fp32, top k, renormalised.

    Source: Mixtral of Experts, arXiv 2401.04088, section 2.1.

    On a CPU its small matrix is kept and multiplied in fp32, and the product rounded to the model's dtype: the same
    numbers, but for the order of sums, and 5 % of a step of one sequence sooner than oneDNN's bf16.
    """

    def __init__(self, weight: torch.Tensor, top_k: int) -> None:
        self.weight = weight.float() if weight.device.type == "cpu" else weight  # [E, D]
        self.top_k = top_k

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and expert indices, both [T, K], most likely first, for `rows` [T, D]."""
        scores = F.linear(rows.to(self.weight.dtype), self.weight).to(rows.dtype)  # [T, E]
        probabilities = scores.float().softmax(dim=-1)  # [T, E]
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # [T, K], [T, K]
        return weights / weights.sum(dim=-1, keepdim=True), experts
