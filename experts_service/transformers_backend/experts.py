"""The maths of experts by the model's own class: a subset of them in all layers, rows grouped by expert.

It has the calls of `kernels.experts.Experts`. Activations, biases, clamps and layouts are the class's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cluster.checkpoint.checkpoint import Checkpoint
from experts_service.kernels.swiglu import Chained, Prepared
from experts_service.transformers_backend.loading import load_experts
from experts_service.transformers_backend.meta_model import build

# R rows, D hidden size


class TransformersExperts:
    """The weights of some experts in all layers that have experts, and what they compute."""

    takes_ends = False

    def __init__(self, experts: Sequence[int], layers: Sequence[nn.Module]) -> None:
        self.experts = tuple(experts)
        self._layers = list(layers)
        into = next(getattr(layers[0], name) for name in ("gate_up_proj", "up_proj") if hasattr(layers[0], name))
        self.dtype, self.device = into.dtype, into.device
        is_transposed = getattr(layers[0], "is_transposed", True)
        self.hidden = int(into.shape[1 if is_transposed else 2])  # D

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_bytes: Callable[[int], None] | None = None,
    ) -> TransformersExperts:
        """Read the experts' tensors, and only those. Raises CheckpointError."""
        meta = build(checkpoint.directory, checkpoint.architecture, dtype)
        return cls(experts, load_experts(meta, checkpoint, experts, device, on_bytes))

    @property
    def num_layers(self) -> int:
        """Those that have experts."""
        return len(self._layers)

    def chained(self, layer: int) -> Chained | None:  # noqa: ARG002
        """No chain runs them."""
        return None

    def prepared(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared | None:  # noqa: ARG002
        """The same."""
        return None

    def run(self, layer: int, rows: Tensor, ends: Tensor, answers: Tensor) -> None:
        """`takes_ends` says that it is not to be called."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        """`rows` [R, D], the first counts[0] for the first expert and so on → `answers` [R, D], new unless given."""
        if answers is None:
            answers = torch.empty_like(rows)
        module = self._layers[layer]
        if not hasattr(module, "is_transposed"):
            _run_evenly(module, rows, counts, answers)
            return answers
        chosen = torch.repeat_interleave(torch.tensor(counts, device=rows.device)).unsqueeze(1)  # [R, 1]
        answers.copy_(module(rows, chosen, rows.new_ones(len(rows), 1)))
        return answers


def _run_evenly(module: nn.Module, rows: Tensor, counts: Sequence[int], answers: Tensor) -> None:
    """Llama 4's take as many rows for each expert: here one expert at a time, by views of their weights."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            weights = {name: whole[expert : expert + 1] for name, whole in module.named_parameters()}
            of_expert = rows[start : start + count]
            answers[start : start + count] = torch.func.functional_call(module, weights, (of_expert,))
        start += count
