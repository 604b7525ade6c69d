"""What is done to rows between matmuls: compiled it is what torch makes of them, and a row sees no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from experts_service.kernels.compiled import jit
from experts_service.transport import Answers
from router_service import rows
from router_service.dispatcher import Dispatch, Dispatcher
from router_service.rows import Combining, choose, norm, rotate

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

NUM_ROWS = [0, 1, 2, 16, 17, 700]
EPSILON = 1e-5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], object]:
    """What a call returns where numba cannot be imported."""

    def run(call: Callable[[], object]) -> object:
        with monkeypatch.context() as without:
            without.setattr(rows, "AVAILABLE", False)
            return call()

    return run


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("width", [16, 96, 1024])
@pytest.mark.usefixtures("_threads")
def test_a_norm_of_numbers_whose_squares_add_up_exactly_has_torchs_bits(num_rows, width, by_torch):
    generator = torch.Generator().manual_seed(num_rows)
    x, delta = (torch.randint(-40, 40, (num_rows, width), generator=generator).bfloat16() / 16 for _ in range(2))
    weight = randn(width)
    for added in (None, delta, delta.t().contiguous().t()):
        ours, theirs = x.clone(), x.clone()
        normed = norm(ours, weight, EPSILON, added)
        assert torch.equal(normed, by_torch(lambda: norm(theirs, weight, EPSILON, added)))  # noqa: B023
        assert torch.equal(ours, theirs)


def test_a_norm_is_next_to_torchs_and_a_row_sees_no_other(by_torch):
    """The mean of the squares is summed in another order: one number in some thousands is rounded the other way."""
    x, delta, weight = randn(300, 512) * 3, randn(300, 512, seed=1), randn(512, seed=2)
    ours, theirs = x.clone(), x.clone()
    normed, expected = norm(ours, weight, EPSILON, delta), by_torch(lambda: norm(theirs, weight, EPSILON, delta))
    assert (normed != expected).double().mean() < 0.002
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=0)
    assert torch.equal(ours, theirs)
    for row in (0, 15, 16, 299):
        assert torch.equal(norm(x[row : row + 1].clone(), weight, EPSILON, delta[row : row + 1])[0], normed[row])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    x, weight = randn(20, 64), randn(64)
    intact = norm(x.clone(), weight, EPSILON)
    x[7, 3] = value
    broken = norm(x.clone(), weight, EPSILON)
    assert broken[7].isnan().any()
    kept = [row for row in range(20) if row != 7]
    assert torch.equal(broken[kept], intact[kept])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("head_dim", [12, 32, 64, 128])
@pytest.mark.usefixtures("_threads")
def test_heads_are_rotated_as_torch_rotates_them(num_rows, head_dim, by_torch):
    """Queries and keys are a part of what one matmul made, whose other part stays as it is. 12 is torch's anyway."""
    qkv = randn(num_rows, 7, head_dim)
    angles = torch.rand(num_rows, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 100
    angles = torch.cat((angles, angles), dim=-1)
    cosines, sines = angles.cos().bfloat16(), angles.sin().bfloat16()
    expected = by_torch(lambda: rotate(qkv[:, :5], cosines, sines))
    ours = qkv.clone()
    assert torch.equal(rotate(ours[:, :5], cosines, sines), expected)
    assert torch.equal(ours[:, 5:], qkv[:, 5:])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 1), (5, 5), (64, 6)])
def test_the_gate_chooses_as_torch_does_and_a_row_sees_no_other(num_rows, num_experts, top_k, by_torch):
    """In bf16 two scores of a row are often the same: many rows of many experts have such a pair."""
    scores = randn(num_rows, num_experts) * 2
    weights, experts = choose(scores, top_k)
    expected, chosen = by_torch(lambda: choose(scores, top_k))
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    for row in range(min(num_rows, 40)):
        alone = choose(scores[row : row + 1], top_k)
        assert torch.equal(alone[0][0], weights[row])
        assert torch.equal(alone[1][0], experts[row])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_scores_that_are_not_finite_goes_to_experts_that_there_are(value, by_torch):
    scores = randn(3, 8)
    intact = choose(scores, 2)
    scores[1, 4] = value
    weights, experts = choose(scores, 2)
    assert torch.equal(experts, by_torch(lambda: choose(scores, 2))[1])
    assert weights[1].isnan().all()
    for ours, expected in zip((weights, experts), intact, strict=True):
        assert torch.equal(ours[[0, 2]], expected[[0, 2]])


def combined(answers: torch.Tensor, weights: torch.Tensor, *order: torch.Tensor | None) -> torch.Tensor:
    combining = Combining(weights.contiguous(), answers.new_empty(len(weights), answers.shape[1]))
    combining.run(answers, *order)
    return combining.totals


class _There:
    """Answers that have come."""

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.usefixtures("_threads")
def test_answers_are_added_up_as_torch_does_it(num_rows, top_k, by_torch):
    generator = torch.Generator().manual_seed(num_rows)
    answers = randn(top_k * num_rows, 48)
    weights = torch.rand(top_k, num_rows, generator=generator).t()  # not contiguous
    places, choices = (
        torch.stack([torch.randperm(top_k, generator=generator) for _ in range(num_rows)], dim=1)
        if num_rows
        else torch.empty(top_k, 0, dtype=torch.int64)
        for _ in range(2)
    )
    of_row = torch.arange(num_rows)
    take, pairs = (one * num_rows + of_row for one in (places, choices))
    if num_rows == 1:
        take, pairs = take[:, 0], pairs[:, 0]
    dispatch = Dispatch(0, num_rows, take, pairs, answers, _There())
    expected = by_torch(lambda: Dispatcher((), None).combine(dispatch, weights))
    assert torch.equal(combined(answers, weights, take, pairs), expected)
    assert torch.equal(Dispatcher((), None).combine(dispatch, weights), expected)
    if num_rows == 1:
        as_they_stand = Dispatch(0, 1, None, None, answers, _There())
        expected = by_torch(lambda: Dispatcher((), None).combine(as_they_stand, weights))
        assert torch.equal(combined(answers, weights, None, None), expected)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 17, 700])
def test_answers_in_pieces_are_added_up_where_they_lie(num_rows: int, top_k: int) -> None:
    """And one that is not finite is noticed, whichever it is: they are not looked at before."""
    width, number = 48, num_rows * top_k
    answers, weights = randn(number, width), torch.rand(num_rows, top_k)
    take = torch.randperm(number).view(top_k, num_rows)
    pairs = torch.arange(number).view(top_k, num_rows).flip(0).contiguous()
    cuts = sorted({0, number // 3, number // 2, number})
    pieces = [answers[start:end].clone() for start, end in pairwise(cuts)]
    table = torch.tensor([(start, piece.data_ptr(), 0) for start, piece in zip(cuts, pieces, strict=False)])
    where = Answers(table.data_ptr(), 3, len(pieces))
    combining = Combining(weights, answers.new_empty(num_rows, width))
    for places, whose in ((take, pairs), (None, None)) if num_rows == 1 else ((take, pairs),):
        assert combining.run_in_place(where, places, whose)
        assert torch.equal(combining.totals, combined(answers, weights, places, whose))
    for value in (torch.inf, -torch.inf, torch.nan):
        for row in {0, number // 2, number - 1}:
            piece, at = next((p, row - s) for s, p in reversed(list(zip(cuts, pieces, strict=False))) if s <= row)
            column = row % width
            kept, piece[at, column] = piece[at, column].clone(), value
            assert not combining.run_in_place(where, take, pairs)
            piece[at, column] = kept
    weights[num_rows // 2, 0] = torch.nan
    assert not combining.run_in_place(where, take, pairs)
