"""The Dispatcher over local experts: equal to transformers, and the same however the experts are packed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.kernels.compiled import jit
from experts_service.kernels.experts import Experts, expert_tensor_names
from router_service.dispatcher import Dispatcher

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 64, 96, 8
PACKINGS: dict[str, list[tuple[int, ...]]] = {
    "1 group": [tuple(range(8))],
    "2 groups": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "3 groups, mixed up": [(7, 0), (3, 1, 5, 6), (2, 4)],
    "4 groups": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "8 groups": [(expert,) for expert in range(8)],
}


def moe_block(top_k: int, dtype: torch.dtype, device: str = "cpu") -> MixtralSparseMoeBlock:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block.to(device, dtype).eval()


def layer_weights(block: MixtralSparseMoeBlock, layer: int = 0) -> dict[str, Tensor]:
    weights = {}
    for expert in range(NUM_EXPERTS):
        w1, w2, w3 = expert_tensor_names(layer, expert)
        weights[w1], weights[w3] = block.experts.gate_up_proj.data[expert].chunk(2)
        weights[w2] = block.experts.down_proj.data[expert]
    return weights


def dispatcher(block: MixtralSparseMoeBlock, packing: list[tuple[int, ...]]) -> Dispatcher:
    local = LocalTransport({i: Experts(experts, [layer_weights(block)]) for i, experts in enumerate(packing)})
    return Dispatcher([ExpertGroup(i, experts) for i, experts in enumerate(packing)], local)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 17, 64])
@torch.inference_mode()
def test_every_packing_gives_the_bits_of_transformers(
    num_rows: int, top_k: int, dtype: torch.dtype, device: str
) -> None:
    block = moe_block(top_k, dtype, device)
    rows = torch.randn(num_rows, HIDDEN, dtype=dtype, device=device)
    expected = block(rows[None])[0]
    _, weights, experts = block.gate(rows)  # [T, K], [T, K]
    for name, packing in PACKINGS.items():
        remote = dispatcher(block, packing)
        answer = remote.combine(remote.dispatch(0, rows, experts), weights)
        if device == "cuda":  # products of all rows at once, which are added up in another order
            tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(answer, expected, atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(answer, expected), name
        remote.end_step()
        if device == "cuda":
            torch.cuda.synchronize()
        assert remote.rows_per_expert == tuple(experts.flatten().bincount(minlength=NUM_EXPERTS).tolist())


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [2, 17])
@torch.inference_mode()
def test_rows_that_a_chain_has_sorted_go_where_they_go_unsorted(
    num_rows: int, top_k: int, packing: list[tuple[int, ...]]
) -> None:
    """One layer after the other in the same memory; what is asked is looked at before the next."""
    block = moe_block(top_k, torch.bfloat16)
    sorting, plain = dispatcher(block, packing), dispatcher(block, packing)
    route = sorting.route(num_rows, top_k, HIDDEN)
    assert route is not None
    rows = torch.empty(num_rows, HIDDEN, dtype=torch.bfloat16)
    chosen = torch.empty(num_rows, top_k, dtype=torch.int64)
    task = route.task(rows, chosen)
    for _ in range(3):
        rows.normal_()
        _, weights, experts = block.gate(rows)
        chosen.copy_(experts)
        task.run()
        expected = plain.dispatch(0, rows, experts)
        found = sorting.dispatch_routed(0, rows, route)
        for name in ("take", "pairs", "answers"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(sorting.combine(found, weights), plain.combine(expected, weights))
        assert sorting.rows_per_expert == plain.rows_per_expert
    assert sorting.route(1, top_k, HIDDEN) is None


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@torch.inference_mode()
def test_all_rows_for_one_expert_leave_the_other_groups_alone(packing: list[tuple[int, ...]]) -> None:
    block = moe_block(1, torch.float32)
    rows = torch.randn(5, HIDDEN)
    experts = torch.full((5, 1), 6)
    weights = torch.ones(5, 1)
    remote = dispatcher(block, packing)
    answer = remote.combine(remote.dispatch(0, rows, experts), weights)
    assert torch.equal(answer, block.experts(rows, experts, weights))
    assert remote.rows_per_expert == (0, 0, 0, 0, 0, 0, 5, 0)


@torch.inference_mode()
def test_two_dispatches_may_be_under_way_and_combine_in_any_order() -> None:
    block = moe_block(2, torch.float32)
    remote = dispatcher(block, PACKINGS["4 groups"])
    batches = [torch.randn(n, HIDDEN) for n in (3, 4)]
    gates = [block.gate(rows)[1:] for rows in batches]
    flights = [remote.dispatch(0, rows, experts) for rows, (_, experts) in zip(batches, gates, strict=True)]
    answers = [remote.combine(flights[i], gates[i][0]) for i in (1, 0)]
    assert torch.equal(answers[0], block(batches[1][None])[0])
    assert torch.equal(answers[1], block(batches[0][None])[0])


@torch.inference_mode()
def test_a_batch_without_rows_asks_nobody() -> None:
    remote = dispatcher(moe_block(2, torch.float32), PACKINGS["2 groups"])
    empty = remote.dispatch(0, torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64))
    assert remote.combine(empty, torch.empty(0, 2)).shape == (0, HIDDEN)
    assert sum(remote.rows_per_expert) == 0


def test_counts_are_read_when_the_device_is_not_in_the_midst_of_writing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of 10 and 20 rows became 15 and 30; read in between, the second expert had given five rows back."""
    remote = dispatcher(moe_block(2, torch.float32), [(0, 1)])
    written = iter([[15, 20], [15, 30], [15, 30]])

    class Ends:
        def numpy(self) -> Ends:
            return self

        def copy(self) -> npt.NDArray[np.int64]:
            return np.array(next(written))

    monkeypatch.setattr(remote, "_grouped", object())
    monkeypatch.setattr(remote, "_ends", Ends(), raising=False)
    assert remote.rows_per_expert == (15, 15)
