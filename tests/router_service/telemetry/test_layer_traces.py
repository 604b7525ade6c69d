"""Spans of groups of layers, for a request that asks for them: the steps' own times, and the same tokens."""

import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.planning.placement import ExpertGroup
from cluster.telemetry.layer_times import MOST_GROUPS, LayerPass, wants_layers
from cluster.telemetry.traces import Traces
from experts_service.carriers.local import LocalTransport
from experts_service.loaded_experts import load_experts
from router_service.dispatcher import Dispatcher
from router_service.scheduling.scheduler import ScheduledSequence
from router_service.scheduling.sequence import Sequence
from router_service.telemetry.engine_traces import EngineTraces
from tests.checkpoints import write_checkpoint
from tests.collector import attributes, collector
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def bf16_experts(directory):
    checkpoint = open_checkpoint(directory)
    experts = load_experts(checkpoint, range(4), dtype=torch.bfloat16, device=torch.device("cpu"))
    return Dispatcher([ExpertGroup(0, tuple(range(4)))], LocalTransport({0: experts}))


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"hidden_size": 96, "head_dim": 32}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "float32"}),
        ({"dense": True}, {}),
        ({}, {"microbatches": 2}),
        ({}, {"model_impl": "transformers"}),
    ],
    ids=["chained", "layer by layer", "dense", "microbatches", "transformers"],
)
def test_layers_of_the_steps_that_a_request_is_in(tmp_path, changes, config):
    write_checkpoint(tmp_path, num_hidden_layers=3, **changes)
    config = config | ({"dispatcher": bf16_experts(tmp_path)} if config.get("dtype") == "bfloat16" else {})
    request = replace(make_request(range(3, 13), max_tokens=4, ignore_eos=True), traceparent=PARENT)
    plain = Bench(tmp_path, **config)
    plain.run(request)
    with collector() as found:
        traces = EngineTraces(Traces("manta-coordinator", found.url))
        bench = Bench(tmp_path, **config)
        bench.engine.model_runner.decoder.layer_times = traces.layer_times
        bench.engine._observe_step = traces.observe_step
        for one in (replace(request, traces_layers=True), replace(request, request_id="other")):
            span = traces.begin(one)
            bench.run(one, make_request(range(20, 30), max_tokens=4, ignore_eos=True))
            traces.end(one, span, 4, None)
        traces.close()
    tokens = [[id_ for chunk in one.chunks[request.key] for id_ in chunk.token_ids] for one in (plain, bench)]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 4
    steps = {span.span_id: span for span in found.named("step")}
    assert len(steps) == 4, "only those of the request that asked"
    [asking, _] = sorted(found.named("generate"), key=lambda span: span.start_time_unix_nano)
    assert {span.parent_span_id for span in steps.values()} == {asking.span_id}
    layers = found.named("layers")
    assert {span.parent_span_id for span in layers} == set(steps)
    for step_id, step in steps.items():
        mine = [span for span in layers if span.parent_span_id == step_id]
        mine.sort(key=lambda one: (attributes(one)["manta.microbatch"], one.start_time_unix_nano))
        assert {attributes(one)["manta.microbatch"] for one in mine} == set(range(config.get("microbatches", 1)))
        mine = mine[:3]
        assert [(attributes(one)["manta.first_layer"], attributes(one)["manta.last_layer"]) for one in mine] == [
            (0, 0),
            (1, 1),
            (2, 2),
        ]
        slack = 1_000  # ns, of rounding
        assert step.start_time_unix_nano - slack <= mine[0].start_time_unix_nano
        assert mine[-1].end_time_unix_nano <= step.end_time_unix_nano + slack
        for before, after in pairwise(mine):
            assert before.end_time_unix_nano <= after.start_time_unix_nano + 1000
        for one in mine:
            took = (one.end_time_unix_nano - one.start_time_unix_nano) / 1e9
            assert 0 <= attributes(one)["manta.experts_s"] <= took + 1e-6


def test_a_step_of_two_that_ask_is_in_the_trace_of_one_and_linked_to_the_other(tmp_path):
    write_checkpoint(tmp_path, num_hidden_layers=3)
    asking = [
        replace(make_request(range(start, start + 9), max_tokens=4), traceparent=PARENT, traces_layers=True)
        for start in (3, 20)
    ]
    with collector() as found:
        traces = EngineTraces(Traces("manta-coordinator", found.url))
        batch = [ScheduledSequence(Sequence(request), 0, 1) for request in asking]
        spans = [traces.begin(request) for request in asking]
        traces.observe_step(0.01, batch)
        traces.end(asking[0], spans[0], 1, None)
        traces.observe_step(0.01, batch[1:])
        traces.end(asking[1], spans[1], 1, None)
        traces.observe_step(0.01, batch)
        traces.close()
    first, second = (span.context.span_id.to_bytes(8, "big") for span in spans)
    both, alone = sorted(found.named("step"), key=lambda step: step.start_time_unix_nano)
    assert (both.parent_span_id, [link.span_id for link in both.links]) == (first, [second])
    assert (alone.parent_span_id, list(alone.links)) == (second, [])


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_layer_reads_a_clock_while_nobody_asks(tmp_path, monkeypatch, dtype, model_impl):
    write_checkpoint(tmp_path, num_hidden_layers=3)
    dispatcher = bf16_experts(tmp_path) if dtype == "bfloat16" else None
    bench = Bench(tmp_path, dtype=dtype, model_impl=model_impl, **({"dispatcher": dispatcher} if dispatcher else {}))
    clock, readers = time.perf_counter, set()

    def read():
        readers.add(sys._getframe(1).f_globals["__name__"])
        return clock()

    monkeypatch.setattr(time, "perf_counter", read)
    bench.run(make_request(range(3, 13), max_tokens=4, ignore_eos=True))
    assert readers, "the engine times steps"
    assert not {name for name in readers if name.startswith("router_service.model.") or "layer_times" in name}


def test_many_layers_are_few_groups(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now) / 4)
    for num_layers, sizes in ((1, [1]), (8, [1] * 8), (9, [2, 2, 2, 2, 1]), (32, [4] * 8), (61, [8] * 7 + [5])):
        one = LayerPass(began=time.perf_counter())
        for _ in range(num_layers):
            one.sent()
            one.combined()
            one.layer()
        groups = one.groups()
        assert [group.last - group.first + 1 for group in groups] == sizes
        assert len(groups) <= MOST_GROUPS
        assert groups[-1].last == num_layers - 1
        assert sum(group.experts_s for group in groups) == num_layers * 0.25
        assert groups[0].began == one.began
        assert groups[-1].ended == one.layers[-1][0]


@pytest.mark.parametrize(
    ("tracestate", "wanted"),
    [
        ("manta=layers", True),
        ("congo=t61rcWkgMzE, manta=layers", True),
        ("manta=all", False),
        ("manta=layers2", False),
        ("", False),
        ("a=b," * 500 + "manta=layers", False),
    ],
)
def test_who_asks(tracestate, wanted):
    assert wants_layers(tracestate) is wanted
