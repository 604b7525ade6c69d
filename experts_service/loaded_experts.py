"""The experts of a group in memory, whoever's code computes them. Knows what they can be asked, and which to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint
from experts_service.kernels.experts import Experts
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.swiglu import Chained, Prepared

# R rows, D hidden size


class LoadedExperts(Protocol):
    """Some experts in all layers, and what they compute."""

    experts: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    hidden: int  # D

    @property
    def num_layers(self) -> int:
        """Those that have experts."""

    @property
    def takes_ends(self) -> bool:
        """Whether `run` can be called: nobody on the host has to know how many rows each expert has."""

    def run(self, layer: int, rows: Tensor, ends: Tensor, answers: Tensor) -> None:
        """`rows` [R, D], those of expert e before `ends` [E] (int32, where the rows are) → `answers` [R, D]."""

    def chained(self, layer: int) -> Chained | None:
        """How a chain runs those of a layer, if one can."""

    def prepared(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared | None:
        """What a call does, to be run without Python, by one thread at a time; None: that cannot be."""

    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        """`rows` [R, D], the first counts[0] for the first expert and so on → `answers` [R, D], new unless given."""


def load_experts(
    checkpoint: Checkpoint,
    experts: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> LoadedExperts:
    """Read these experts' tensors, and only those. `kernel` multiplies.

    Raises CheckpointError.
    """
    if checkpoint.model_impl == "transformers":
        from experts_service.transformers_backend.experts import load  # takes seconds to import

        return load(checkpoint, experts, dtype=dtype, device=device, kernel=kernel, on_bytes=on_bytes)
    return Experts.load(checkpoint, experts, dtype=dtype, device=device, kernel=kernel, on_bytes=on_bytes)
