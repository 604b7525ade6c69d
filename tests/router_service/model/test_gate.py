"""The gate chooses and weighs as the reference's formula does."""

import pytest
import torch
import torch.nn.functional as F

from router_service.model.gate import Gate


@pytest.mark.parametrize("num_rows", [0, 1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula_in_the_models_dtype(dtype, num_rows, device):
    generator = torch.Generator().manual_seed(num_rows)
    # Small numbers of few bits: their sums are exact in whatever order.
    rows, weight = (torch.randint(-9, 10, (n, 64), generator=generator).to(device, dtype) / 16 for n in (num_rows, 8))
    weights, experts = Gate(weight, 2)(rows)
    scores = F.linear(rows.double(), weight.double()).to(dtype).float().cpu()  # rounded once
    expected, chosen = scores.softmax(dim=-1).topk(2, dim=-1)  # of equal ones the first, which on a GPU it may not be
    assert torch.equal(experts.cpu(), chosen)
    torch.testing.assert_close(weights.cpu(), expected / expected.sum(dim=-1, keepdim=True))
    assert weights.dtype is torch.float32


def test_in_fp32_its_bits_are_the_references(device):
    rows, weight = torch.randn(7, 64, device=device), torch.randn(8, 64, device=device)
    expected, _ = F.linear(rows, weight).softmax(dim=-1).topk(2, dim=-1)
    weights = Gate(weight, 2)(rows)[0]
    if device == "cuda":  # e^x and what is divided are our kernel's
        torch.testing.assert_close(weights, expected / expected.sum(dim=-1, keepdim=True), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(weights, expected / expected.sum(dim=-1, keepdim=True))
