"""Whether numbers are finite, wherever among them one is not."""

from __future__ import annotations

import math

import pytest
import torch

from experts_service.kernels.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 3, 4, 8, 500, 4096])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(count: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    numbers = torch.tensor([0.0, -0.0, 1e-38, -3.0]).repeat(count)[:count].to(dtype)
    numbers[0] = most
    assert all_finite(numbers)
    for place in {0, count // 2, count - 1}:
        for wrong in (math.inf, -math.inf, math.nan, -math.nan):
            spoilt = numbers.clone()
            spoilt[place] = wrong
            assert not all_finite(spoilt), (place, wrong)


def test_large_numbers_are_finite_though_their_sum_is_not() -> None:
    """torch's sum of them, which was asked before, is infinite in bf16; each row was looked at again for that."""
    numbers = torch.full((2, 8), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert not math.isfinite(numbers.sum())
    assert all_finite(numbers)


def test_no_numbers_are_finite() -> None:
    assert all_finite(torch.empty(0, 8, dtype=torch.bfloat16))
