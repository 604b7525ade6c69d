"""Rows are routed on the device as the host does it: the same order, the same sums, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401
from cluster.planning.placement import ExpertGroup, as_one
from experts_service.carriers.local import ANSWERED, LocalTransport
from experts_service.kernels.experts import Experts
from experts_service.transport import Flight, GroupRows
from router_service import routing
from router_service.dispatcher import Dispatcher
from tests.router_service.test_dispatcher import HIDDEN, NUM_EXPERTS, PACKINGS, layer_weights, moe_block

DTYPES = [torch.float32, torch.bfloat16]


def choices(num_rows: int, top_k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K]: some experts get many rows, some none."""
    generator = torch.Generator().manual_seed(num_rows)
    likely = torch.tensor([4.0, 1.0, 0.0, 2.0, 1.0, 0.1, 1.0, 1.0]).expand(num_rows, -1)
    experts = torch.multinomial(likely, top_k, generator=generator) if num_rows else torch.empty(0, top_k).long()
    return torch.rand(num_rows, top_k, generator=generator).to(device), experts.to(device)


class _Noted:
    """A transport that keeps what it was to carry, and answers with numbers of its own."""

    takes_device_rows = False

    def __init__(self) -> None:
        self.parts: list[GroupRows] = []

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        self.parts += parts
        for part in parts:
            part.answers.copy_(made_up(part.answers))
        return ANSWERED

    def close(self) -> None:
        pass


def made_up(answers: Tensor) -> Tensor:
    return torch.randn(answers.shape, generator=torch.Generator().manual_seed(7)).to(answers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", ["1 group", "3 groups, mixed up"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 17, 700])
@torch.inference_mode()
def test_a_device_finds_the_order_and_the_sums_of_the_host(num_rows, top_k, packing, dtype, device):
    weights, experts = choices(num_rows, top_k)
    noted = _Noted()
    on_host = Dispatcher([ExpertGroup(i, group) for i, group in enumerate(PACKINGS[packing])], noted)
    rows = torch.randn(num_rows, 48).to(dtype)
    expected = on_host.combine(on_host.dispatch(0, rows, experts), weights)

    ends_so_far = torch.zeros(NUM_EXPERTS, dtype=torch.int64, device=device)
    ranks = torch.from_numpy(on_host._rank).to(device)
    routed = routing.route(experts.to(device), ranks, ends_so_far)
    assert routed.row_indices.tolist() == [row for part in noted.parts for row in part.row_indices.tolist()]
    counts = routed.ends.diff(prepend=routed.ends.new_zeros(1)).tolist()
    assert counts == [on_host.rows_per_expert[expert] for expert in on_host._order]
    assert torch.equal(ends_so_far, routed.ends.long())
    answers = made_up(torch.empty(num_rows * top_k, 48, dtype=dtype)).to(device)
    assert torch.equal(routing.combine(answers, weights.to(device), routed).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 33])
@torch.inference_mode()
def test_experts_that_take_ends_answer_as_those_that_are_told_counts(num_rows, dtype, device):
    """Their rows are counted all the same, as the host would count them."""
    [group] = as_one([ExpertGroup(0, (7, 0)), ExpertGroup(1, (3, 1, 5, 6)), ExpertGroup(2, (2, 4))])
    assert group.experts == (7, 0, 3, 1, 5, 6, 2, 4)
    block = moe_block(2, dtype, device)
    experts = Experts(group.experts, [layer_weights(block, layer) for layer in range(2)], grouped=True)
    by_ends, by_counts = (Dispatcher([group], LocalTransport({0: experts})) for _ in range(2))
    by_counts._grouped = None
    weights, chosen = choices(num_rows, 2, device)
    rows = torch.randn(num_rows, HIDDEN).to(device, dtype)
    for layer in range(2):
        dispatches = [dispatcher.dispatch(layer, rows, chosen) for dispatcher in (by_ends, by_counts)]
        assert dispatches[0].routing is not None
        assert dispatches[1].routing is None or device == "cuda"  # there answers are combined as they lie
        answers = [
            dispatcher.combine(dispatch, weights)
            for dispatcher, dispatch in zip((by_ends, by_counts), dispatches, strict=True)
        ]
        assert torch.equal(*answers)
    by_ends.end_step()
    if device == "cuda":
        torch.cuda.synchronize()
    assert by_ends.rows_per_expert == by_counts.rows_per_expert
    assert sum(by_ends.rows_per_expert) == 2 * 2 * num_rows


@pytest.mark.parametrize("num_real", [0, 1, 5, 8])
@torch.inference_mode()
def test_rows_of_padding_go_to_no_expert_and_are_not_counted(num_real, device):
    """They were multiplied with the weights of experts that nobody else chose, and told as rows of users."""
    experts = Experts(range(NUM_EXPERTS), [layer_weights(moe_block(2, torch.float32, device))], grouped=True)
    padded, exact = (
        Dispatcher([ExpertGroup(0, tuple(range(NUM_EXPERTS)))], LocalTransport({0: experts})) for _ in range(2)
    )
    weights, chosen = choices(8, 2, device)
    rows = torch.randn(8, HIDDEN).to(device)
    expected = exact.combine(exact.dispatch(0, rows[:num_real], chosen[:num_real]), weights[:num_real])
    real = torch.tensor([num_real], device=device)
    dispatch = padded.dispatch(0, rows, chosen, real)
    assert torch.equal(padded.combine(dispatch, weights)[:num_real], expected)
    for dispatcher in (padded, exact):
        dispatcher.end_step()
    if device == "cuda":
        torch.cuda.synchronize()
    assert padded.rows_per_expert == exact.rows_per_expert
    assert sum(padded.rows_per_expert) == 2 * num_real


def test_experts_one_by_one_need_counts():
    one_by_one = Experts(range(NUM_EXPERTS), [layer_weights(moe_block(2, torch.float32))])
    assert LocalTransport({0: one_by_one}).grouped is None
    assert LocalTransport({}).grouped is None
