"""A whole step on a GPU, which nobody waits for: on tensors without memory, and what it would launch is counted.

A launch is an operation of torch's that is no view, or a kernel of ours. Some of torch's are two kernels or more.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from cluster.checkpoint.architecture import Architecture, Shape, coordinator_tensors, expert_tensors
from cluster.checkpoint.known_models import (
    GRANITE_3B_A800M,
    MISTRAL_7B_V2,
    MIXTRAL_8X7B,
    OLMOE_1B_7B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN15_MOE_A2_7B,
    QWEN25_7B,
)
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.kernels import swiglu
from experts_service.kernels.experts import Experts
from experts_service.transport import Flight, GroupRows
from router_service import dispatcher, rows
from router_service.attention.backend import AttentionBackend
from router_service.attention.choice import attention_backend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.reference import ReferenceAttention
from router_service.attention.triton_paged import TritonPlan
from router_service.dispatcher import Dispatch, Dispatcher
from router_service.model import graphs
from router_service.model.decoder import Decoder
from router_service.model.graphs import DecodeGraphs
from router_service.model.model_runner import ModelRunner
from router_service.model.warm_up import warm_up
from router_service.outputs.pooling import embedding
from router_service.scheduling.scheduler import ScheduledSequence
from tests.fake_gpu import DEVICE, Counts, fake_gpu
from tests.router_service.requests import make_sequence

T = TypeVar("T")

BLOCK = 256
DTYPE = torch.bfloat16
STEPS = {
    "decode": [Span(40, 1, array("i", [1])), Span(8, 1, array("i", [2])), Span(9000, 1, array("i", range(3, 40)))],
    "prefill": [Span(0, 40, array("i", [1]))],
}
MISTRAL = MISTRAL_7B_V2  # what has no memory may be large


# Of each family, and how many launches a layer of it may be. More than 20 are norms over heads, biases and an expert
# that all rows go to, by torch's operations; in a CUDA graph they cost no time of the host.
FAMILIES = {
    "mixtral": (MIXTRAL_8X7B, 20),
    "mistral": (MISTRAL, 15),
    "qwen3_moe": (QWEN3_30B_A3B, 24),
    "qwen3": (QWEN3_8B, 17),
    "qwen2_moe": (QWEN15_MOE_A2_7B, 31),
    "qwen2": (QWEN25_7B, 12),
    "olmoe": (OLMOE_1B_7B, 25),
    "granitemoe": (GRANITE_3B_A800M, 24),
}


@pytest.mark.parametrize(("architecture", "most"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_launches_little_and_nobody_waits_for_a_step(monkeypatch, step, architecture, most):
    """It was 49 launches and 5 waits a layer, with experts here."""
    few, many = (_forward(monkeypatch, _of_layers(architecture, n), STEPS[step]) for n in (1, 3))
    _check(few, many, most, step)


def test_without_a_compiler_torch_launches_more_and_nobody_waits_either(monkeypatch):
    for module in (rows, swiglu):
        monkeypatch.setattr(module, "compiles_for", lambda _: False)
    few, many = (_forward(monkeypatch, _of_layers(MIXTRAL_8X7B, n), STEPS["decode"]) for n in (1, 3))
    _check(few, many, 60, "decode without Triton")


def test_on_an_old_card_no_kernel_of_ours_is_started(monkeypatch):
    """A T4 would have got norms that Triton does not compile for it, though its experts were torch's."""
    with fake_gpu(monkeypatch, capability=(7, 5)) as counts:
        gate_up = torch.empty(3, 64, dtype=DTYPE, device=DEVICE)
        rows.norm(gate_up, gate_up[0], 1e-5)
        rows.choose(gate_up, 2)
        swiglu.silu_product(gate_up)
        assert not rows.is_launched(gate_up)
    assert not {"norm", "choose", "silu_product"} & set(counts.launches)


def test_on_an_old_card_a_model_in_float32_is_torchs_operations_and_nothing_else(monkeypatch):
    """Such cards have no bf16, which is refused. What is slow there is slow; nothing may be missing."""
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", torch.float32)
    sequence = make_sequence([1] * 41)
    sequence.block_table.append(1)
    with fake_gpu(monkeypatch, capability=(7, 5)) as counts, torch.inference_mode():
        decoder, attention, kv_cache = _model(_of_layers(MIXTRAL_8X7B, 2))
        assert isinstance(attention, ReferenceAttention)
        assert attention.decode_plan(1, 64) is None, "no step is captured"
        runner = ModelRunner(decoder, kv_cache, attention, block_size=BLOCK)
        for scheduled in (ScheduledSequence(sequence, 0, 40), ScheduledSequence(sequence, 40, 1)):
            output = runner.forward([scheduled])
            assert output.land() == []
        assert (output.logits.device, output.logits.shape) == (DEVICE, (1, MIXTRAL_8X7B.vocab_size))
    assert not counts.kernels


@pytest.mark.parametrize("step", STEPS)
def test_experts_elsewhere_are_waited_for_once_a_layer(monkeypatch, step):
    """Rows and choices to the host, one copy of each; answers from it by one copy that nobody waits for."""
    few, many = (_forward(monkeypatch, _of_layers(MIXTRAL_8X7B, n), STEPS[step], elsewhere=True) for n in (1, 3))
    of_two = many - few
    _tell(of_two, few, f"{step}, experts elsewhere")
    assert of_two.num_launches <= 2 * 20
    assert (few.num_waits, many.num_waits) == (1, 3)
    assert (of_two.copies_to_host, of_two.copies_to_device) == (4, 2)
    num_rows = sum(span.length for span in STEPS[step])
    assert of_two.bytes_to_host == 2 * num_rows * (4096 * 2 + 2 * 8)
    assert of_two.bytes_to_device == 2 * num_rows * 2 * 4096 * 2


def _of_layers(architecture: Architecture, number: int) -> Architecture:
    return replace(architecture, layers=architecture.layers[:number])


def _check(few: Counts, many: Counts, most: int, title: str) -> None:
    """Of steps of one layer and of three."""
    of_two = many - few
    _tell(of_two, few, title)
    assert of_two.num_launches <= 2 * most
    assert of_two.bytes_to_device == of_two.bytes_to_host == 0
    assert not few.waits
    assert not many.waits


def _tell(of_two: Counts, few: Counts, title: str) -> None:
    of_a_layer = {name: number / 2 for name, number in of_two.launches.items()}
    print(f"\n{title}: {of_two.num_launches / 2:g} launches a layer, {few.num_launches} of one: {of_a_layer}")


def test_a_replayed_step_with_experts_elsewhere_launches_nothing_between_its_pieces(monkeypatch):
    """A replay, a wait and a copy of answers for each layer. Rows and choices are copied to the host by the graph."""
    few, many = (_replayed(monkeypatch, _of_layers(MIXTRAL_8X7B, n), STEPS["decode"]) for n in (1, 3))
    of_two = many - few
    assert of_two.launches == {"replay": 2}
    assert few.launches == {"replay": 2, "copy_": 3, "fill_": 1}, "ids, positions, attention's plan; how many are real"
    assert (few.waits, many.waits) == ({"queue": 1}, {"queue": 3})
    assert (of_two.copies_to_host, of_two.copies_to_device) == (0, 2)
    assert of_two.bytes_to_device == 2 * 3 * 2 * 4096 * 2, "answers of three rows, though the graph is of four"


def _replayed(monkeypatch: pytest.MonkeyPatch, architecture: Architecture, spans: list[Span]) -> Counts:
    """What a captured step asks of its GPU, its experts being elsewhere."""
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        decoder, attention, kv_cache = _model(architecture, elsewhere=True)
        decode_graphs = DecodeGraphs(
            decoder,
            kv_cache,
            lambda size: attention.decode_plan(size, 9216),
            lambda: _Graph(counts),
            max_num_seqs=4,
            block_size=BLOCK,
        )
        monkeypatch.setattr(graphs, "check_device", lambda _: pytest.fail("it could not be captured"))
        monkeypatch.setattr(dispatcher, "wait_for_queue", lambda _: counts.waits.update(["queue"]))
        decode_graphs.capture()
        send = decoder.dispatcher._dispatch_on_host

        def sent(layer: int, rows: torch.Tensor, experts: torch.Tensor, answers: torch.Tensor) -> Dispatch:
            with unset_fake_temporarily():
                chosen = torch.arange(experts.shape[1]).expand(experts.shape).contiguous()
            return send(layer, rows, chosen, answers)

        monkeypatch.setattr(decoder.dispatcher, "_dispatch_on_host", sent)
        metadata = AttentionMetadata(spans, BLOCK)
        token_ids, positions = (torch.empty(len(spans), dtype=torch.int64, device=DEVICE) for _ in range(2))
        before = counts.copy()
        logits = decode_graphs(token_ids, positions, metadata)
        assert logits is not None
        assert logits.shape == (len(spans), architecture.vocab_size)
        return counts - before


class _Graph:
    """A graph in which nobody waits, nothing is copied to the device, and pinned memory was there before."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def capture(self, run: Callable[[], T]) -> T:
        before = self._counts.copy()
        result = run()
        assert not (self._counts - before).waits
        assert not (self._counts - before).copies_to_device
        return result

    def replay(self) -> None:
        self._counts.launches["replay"] += 1


class _Elsewhere:
    """A transport whose rows are on the host, and whose answers come back as those of RemoteFlight do."""

    takes_device_rows = False

    def send(self, layer: int, rows: torch.Tensor, parts: Sequence[GroupRows]) -> Flight:
        assert rows.is_cpu
        self.answers = parts[0].answers
        return self

    def wait(self) -> None:
        torch.ops.aten.copy_(self.answers, torch.empty(self.answers.shape, dtype=DTYPE, pin_memory=True), True)

    def close(self) -> None:
        pass


def _forward(
    monkeypatch: pytest.MonkeyPatch, architecture: Architecture, spans: list[Span], *, elsewhere: bool = False
) -> Counts:
    """What the layers of one step ask of their GPU."""
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        decoder, attention, kv_cache = _model(architecture, elsewhere=elsewhere)
        metadata = AttentionMetadata(spans, BLOCK)
        num_rows = len(metadata.positions)
        token_ids, positions = (torch.empty(num_rows, dtype=torch.int64, device=DEVICE) for _ in range(2))
        plan = attention.plan(metadata)
        assert isinstance(plan, TritonPlan)
        before = counts.copy()
        x = _finished(decoder.forward(token_ids, positions, plan, kv_cache))
        assert decoder.logits(decoder.hidden_states(x)).shape == (num_rows, architecture.vocab_size)
        return counts - before


def test_a_step_that_decodes_is_launched_by_copies_that_nobody_waits_for(monkeypatch):
    """One of what all layers need, one of attention's; and back the counts of rows, which are read a step late."""
    batch = []
    for number, length in enumerate((41, 9)):
        sequence = make_sequence([1] * length)
        sequence.block_table.append(1 + number)
        sequence.pending_row = number  # the host has not read the token that this step begins with
        batch.append(ScheduledSequence(sequence, length, 1))
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        decoder, attention, kv_cache = _model(_of_layers(MIXTRAL_8X7B, 2))
        runner = ModelRunner(decoder, kv_cache, attention, block_size=BLOCK)
        runner.pending = torch.empty(2, dtype=torch.int64, device=DEVICE)
        before = counts.copy()
        output = runner.forward(batch)
        counts -= before
    assert (output.logits.device, output.logits.shape) == (DEVICE, (2, MIXTRAL_8X7B.vocab_size))
    assert not counts.waits
    assert (counts.copies_to_device, counts.copies_to_host) == (2, 1)
    assert counts.launches["cat"] == 1, "of angles: logits of one microbatch are not copied"


WISHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scores": {"prompt_logprobs": 3},
    "a mean": {"pooling": "mean"},
    "experts": {"routed_experts": True, "max_tokens": 2},
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_prefill_is_waited_for_once_when_all_of_it_is_launched(monkeypatch, wish):
    """It was waited for in its midst to see whether it is finite, three times for each 256 scores, and so on."""
    sequence = make_sequence([1] * 600, **WISHES[wish])
    sequence.block_table += array("i", [1, 2, 3])
    batch = [ScheduledSequence(sequence, 0, 600)]
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        decoder, attention, kv_cache = _model(_of_layers(MIXTRAL_8X7B, 2))
        runner = ModelRunner(decoder, kv_cache, attention, block_size=BLOCK)
        before = counts.copy()
        output = runner.forward(batch)
        assert not (counts - before).waits
        assert output.land() == []
        if wish == "a mean":
            with unset_fake_temporarily():
                embedding(sequence)
        assert (counts - before).waits == {"copy to host": 1}
    if wish == "scores":
        assert sequence.prompt_logprobs is not None
        assert len(sequence.prompt_logprobs) == 600, "of all tokens but the first, which has none"
    if wish == "experts":
        assert sequence.routed_experts is not None
        assert len(sequence.routed_experts) == 2 * 2 * 2, "layers, choices, bytes"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("architecture", [one for one, _ in FAMILIES.values()], ids=FAMILIES)
def test_no_step_waits_for_a_kernel_to_be_compiled(monkeypatch, architecture, elsewhere):
    """The first request of a model waited for all of them, and the first long prompt for the other tiles."""
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        decoder, attention, kv_cache = _model(_of_layers(architecture, 2), elsewhere=elsewhere)
        counted = decoder.dispatcher
        warm_up(decoder, attention)
        assert decoder.dispatcher is counted
        compiled = set(counts.kernels)
        padded = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for num_rows, num_real in ((1, None), (3, padded), (40, None), (2000, None)):
            zeros = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
            plan = attention.plan(AttentionMetadata([Span(0, num_rows, array("i", range(1, 10)))], BLOCK))
            _finished(decoder.forward(zeros, zeros, plan, kv_cache, num_real=num_real))
        assert {"norm", "rotate", "attend"} <= {name for name, *_ in compiled}
        assert set(counts.kernels) == compiled


def test_a_shard_has_products_compiled_when_it_has_loaded(monkeypatch):
    with fake_gpu(monkeypatch) as counts, torch.inference_mode():
        layer = [expert_tensors(MIXTRAL_8X7B, 0, expert).items() for expert in range(8)]
        experts = Experts(range(8), [_weights(one for of_expert in layer for one in of_expert)])
        experts.warm_up()
        compiled = set(counts.kernels)
        for num_rows in (1, 9, 500):
            rows = torch.zeros(num_rows, 4096, dtype=DTYPE, device=DEVICE)
            experts(0, rows, [num_rows, *[0] * 7])
        assert len(compiled) >= 4
        assert set(counts.kernels) == compiled


def _model(architecture: Architecture, *, elsewhere: bool = False) -> tuple[Decoder, AttentionBackend, KVCache]:
    experts = tuple(range(architecture.num_experts))
    layers = [
        _weights(tensors for expert in experts for tensors in expert_tensors(architecture, layer, expert).items())
        for layer in range(architecture.num_layers)
    ]
    groups = {0: Experts(experts, layers)} if experts else {}
    transport = _Elsewhere() if elsewhere else LocalTransport(groups)
    to_experts = Dispatcher([ExpertGroup(index, experts) for index in groups], transport)
    decoder = Decoder(architecture, _weights(coordinator_tensors(architecture).items()), to_experts)
    attention = attention_backend(architecture, block_size=BLOCK, dtype=DTYPE, device=DEVICE)
    return decoder, attention, KVCache(architecture.num_layers, 40, attention.layout, dtype=DTYPE, device=DEVICE)


def _finished(steps: Generator[Dispatch, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return cast("torch.Tensor", finished.value)


def _weights(shapes: Iterable[tuple[str, Shape]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=DTYPE, device=DEVICE) for name, shape in shapes}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu().numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: bool((x > 0).any()),
    ],
)
def test_what_needs_a_number_of_the_device_fails(monkeypatch, wait: Callable[[torch.Tensor], object]):
    with fake_gpu(monkeypatch), pytest.raises((RuntimeError, AssertionError)):
        wait(torch.empty(3, device=DEVICE))


def test_copies_that_are_waited_for_are_counted(monkeypatch):
    with fake_gpu(monkeypatch) as counts:
        x = torch.empty(3, device=DEVICE)
        x.cpu()
        torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        torch.ones(5).to(DEVICE)
    assert counts.waits == {"to host": 1, "to device": 1}
    assert (counts.bytes_to_host, counts.bytes_to_device) == (24, 20)
