"""Random numbers in bf16, and what a row that is not finite does to its neighbours, for all ways to multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check_that_a_broken_row_is_alone(multiply: Callable[[Tensor], Tensor], num_inputs: int, value: float) -> None:
    """It is told by its numbers; the others go on."""
    x = randn(6, num_inputs, seed=3)
    intact = multiply(x)
    x[2, 5] = value
    broken = multiply(x)
    assert not broken[2].isfinite().any()
    assert torch.equal(broken[[0, 1, 3, 4, 5]], intact[[0, 1, 3, 4, 5]])
