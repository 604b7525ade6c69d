"""What is done to rows on a GPU is what torch makes of them, and a row sees no other: Triton's kernels, interpreted."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401
from router_service import gpu_rows, routing, rows
from tests.programs import said_by
from tests.router_service.test_routing import choices, made_up

DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture
def by_torch(monkeypatch):
    """`rows` without kernels of our own."""
    monkeypatch.setattr(rows, "is_compiled", lambda *_: False)
    monkeypatch.setattr(rows, "is_launched", lambda _: False)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 1024])
def test_a_norm_is_next_to_torchs_and_a_row_sees_no_other(width, dtype, device, by_torch):
    """The mean of squares is summed in another order: one number in some hundreds is rounded the other way."""
    x, delta = (randn(9, width, dtype=dtype, device=device, seed=seed) * 3 for seed in (1, 2))
    weight = randn(width, dtype=dtype, device=device)
    for added in (None, delta):
        ours, theirs = x.clone(), x.clone()
        normed, expected = gpu_rows.norm(ours, weight, EPSILON, added), by_torch.norm(theirs, weight, EPSILON, added)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(normed, expected, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=0)
        if dtype is torch.bfloat16:
            assert (normed != expected).double().mean() < 0.005
        for row in (0, 8):
            one = slice(row, row + 1)
            alone = gpu_rows.norm(x[one].clone(), weight, EPSILON, None if added is None else added[one])
            assert torch.equal(alone[0], normed[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [12, 64])
def test_heads_are_rotated_as_torch_rotates_them(head_dim, dtype, device, by_torch):
    """Queries and keys are a part of what one matmul made, whose other part stays as it is."""
    qkv = randn(5, 13, head_dim, dtype=dtype, device=device)
    angles = torch.rand(5, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 100
    angles = torch.cat((angles, angles), dim=-1).to(device)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = by_torch.rotate(qkv[:, :11], cosines, sines)
    ours = qkv.clone()
    assert torch.equal(gpu_rows.rotate(ours[:, :11], cosines, sines), expected)
    assert torch.equal(ours[:, 11:], qkv[:, 11:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 1), (5, 5), (64, 6)])
def test_the_gate_chooses_as_torch_does(num_experts, top_k, dtype, device, by_torch, renormalised):
    """Scores of a row differ here: of equal ones torch says nothing about which comes first."""
    order = torch.stack([torch.randperm(num_experts, generator=torch.Generator().manual_seed(row)) for row in range(9)])
    scores = (order.float() / 4 - num_experts / 8).to(device, dtype)
    weights, experts = gpu_rows.choose(scores, top_k, renormalised=renormalised)
    expected, chosen = by_torch.choose(scores, top_k, renormalised=renormalised)
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_of_equal_scores_the_first_are_chosen(device):
    weights, experts = gpu_rows.choose(torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0]], device=device), 2)
    assert experts.tolist() == [[1, 3]]
    assert weights.tolist() == [[pytest.approx(0.5, rel=1e-6)] * 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_scores_that_are_not_finite_goes_to_experts_that_there_are(value, device):
    scores = randn(3, 8, dtype=torch.bfloat16, device=device)
    intact = gpu_rows.choose(scores, 2)
    scores[1, 4] = value
    with np.errstate(invalid="ignore"):  # the interpreter's
        weights, experts = gpu_rows.choose(scores, 2)
    assert len(set(experts[1].tolist()) & set(range(8))) == 2
    assert weights[1].isnan().all()
    for ours, expected in zip((weights, experts), intact, strict=True):
        assert torch.equal(ours[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("num_rows", "num_real"), [(1, None), (17, None), (700, None), (17, 0), (17, 5)])
def test_rows_are_routed_and_answers_added_up_as_torch_does_it(num_rows, num_real, top_k, dtype, device):
    weights, experts = choices(num_rows, top_k, device)
    ranks = torch.tensor([1, 3, 6, 2, 7, 4, 5, 0], device=device)
    ours, theirs = (torch.arange(8, device=device) for _ in range(2))
    real = None if num_real is None else torch.tensor([num_real], device=device)
    expected = routing.route(experts, ranks, theirs, real)
    row_indices, ends, places = gpu_rows.route(experts, ranks, ours, real)
    for one, other in zip((row_indices, ends, places, ours), (*expected[1:], theirs), strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)
    few = slice(0, 20)  # the interpreter is slow
    answers = made_up(torch.empty(num_rows * top_k, 48, dtype=dtype)).to(device)
    sums = routing.combine(answers.clone(), weights, expected)[few]
    places = places.view(top_k, num_rows)[:, few].reshape(-1)
    assert torch.equal(gpu_rows.combine(answers, weights[few], experts[few], places, 8), sums)


@pytest.mark.long
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "float32"), (89, "bfloat16"), (90, "bfloat16"), (100, "bfloat16")]
)
def test_triton_compiles_them_for_cards_that_nobody_has(capability, dtype):
    """A compiler refuses what the interpreter takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shared = json.loads(
        said_by("router_service.compile_rows", capability, dtype, environment=environment, timeout_s=600)
    )
    assert list(shared) == ["norm", "rotate", "choose", "route", "combine", "silu_product"]
    assert max(shared.values()) <= 99 * 2**10
