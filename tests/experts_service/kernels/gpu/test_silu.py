"""The kernel between the products of a feed-forward network rounds as torch does: interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tests.triton_interpreter  # noqa: F401
from experts_service.kernels.gpu.silu import silu_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [48, 1500])
def test_it_is_silu_times_the_other_half(width, dtype, device):
    """e^x is another polynomial than torch's: in bf16 it is rounded to the same number, nearly always."""
    gate_up = torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 4
    gate, up = gate_up.chunk(2, dim=-1)
    ours, expected = silu_product(gate_up), F.silu(gate) * up
    torch.testing.assert_close(ours, expected, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-30)
    assert dtype is torch.float32 or (ours != expected).double().mean() < 0.005
