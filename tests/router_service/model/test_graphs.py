"""Captured steps against eager ones: on a CPU by graphs that run the recorded function again, on a GPU by CUDA's."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import ConfigError, ExpertUnavailable
from cluster.planning.placement import gib
from cluster.planning.step_memory import graph_bytes, graph_sizes
from experts_service.kernels.compiled import jit
from router_service.attention.backend import StaticPlan
from router_service.dispatcher import Dispatcher
from router_service.model import graphs
from router_service.model.graphs import DecodeGraphs
from router_service.model.warm_up import capture
from tests.checkpoints import random_mistral, random_mixtral
from tests.router_service.engine.test_engine import prompt
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

LARGEST = 5
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 300}


class Recorded:
    """Runs what it captured again, and leaves the result where the first one lay. As CUDA's, it has no other input."""

    def __init__(self):
        self.num_replays = 0

    def capture(self, run):
        self.run = run
        self.result = run()
        if isinstance(self.result, torch.Tensor):
            self.result = self.result.clone().fill_(float("nan"))  # capturing computes nothing
        return self.result

    def replay(self):
        self.num_replays += 1
        result = self.run()
        if isinstance(self.result, torch.Tensor):
            self.result.copy_(result)
        else:
            assert result.exchange is self.result.exchange, "what is sent lies elsewhere"


class Padded(StaticPlan):
    """Plans of another backend for the rows that there are; those behind them write nothing, and see zeros."""

    def __init__(self, backend, num_sequences):
        self.backend, self.num_sequences = backend, num_sequences

    def update(self, metadata):
        self.num_rows = len(metadata.positions)
        self.plan = self.backend.plan(metadata) if self.num_rows else None
        assert self.num_rows <= self.num_sequences

    def write(self, layer, keys, values, kv_cache):
        raise AssertionError("attend does both")

    read = write

    def attend(self, layer, queries, keys, values, kv_cache):
        n = self.num_rows
        attended = torch.zeros_like(queries)
        if n:
            attended[:n] = self.plan.attend(layer, queries[:n], keys[:n], values[:n], kv_cache)
        return attended


@pytest.fixture(scope="module", params=["mixtral", "mistral"])
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = random_mistral(**SIZES) if request.param == "mistral" else random_mixtral(num_local_experts=8, **SIZES)
    model.bfloat16().save_pretrained(directory, save_original_format=True)
    return directory


def bench_with_graphs(directory, new_graph, **config):
    """In bf16 by our own products, of which a row's bits do not depend on how many rows there are."""
    bench = Bench(directory, kernels="fma", **config)
    bench.engine.model_runner.graphs = recorded(bench.engine.model_runner, new_graph, LARGEST)
    return bench


def recorded(runner, new_graph, max_num_seqs):
    """Graphs on a CPU."""
    return DecodeGraphs(
        runner.decoder,
        runner.kv_cache,
        lambda size: Padded(runner.attention, size),
        new_graph,
        max_num_seqs=max_num_seqs,
        block_size=runner.block_size,
    )


class Elsewhere:
    """A transport to experts that are not the coordinator's: they get rows on the host, and may be away."""

    takes_device_rows = False

    def __init__(self, dispatcher):
        self.inner = dispatcher._transport
        self.sent = []  # rows of each dispatch
        self.is_away = False

    def send(self, layer, rows, parts):
        if self.is_away:
            raise ExpertUnavailable("nobody is there", group=0)
        self.sent.append(len(rows))
        return self.inner.send(layer, rows, parts)

    def close(self):
        self.inner.close()


def bench_with_pieces(directory, new_graph, **config):
    """The same with experts elsewhere, in two groups."""
    bench = bench_with_graphs(directory, new_graph, num_groups=2, **config)
    decoder = bench.engine.model_runner.decoder
    transport = Elsewhere(decoder.dispatcher)
    decoder.dispatcher = Dispatcher(decoder.dispatcher._groups, transport)
    decoder._has_chains = False  # which are for CPUs, and are not captured
    return bench, transport


def requests(count):
    return [
        make_request(prompt(3 + 9 * i, i), seed=i, temperature=i % 2, max_tokens=4 + 2 * i, ignore_eos=True, logprobs=2)
        for i in range(count)
    ]


def told(bench, asked):
    return [[(chunk.token_ids, chunk.logprobs) for chunk in bench.chunks[request.key]] for request in asked]


needs_numba = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")


@needs_numba
@pytest.mark.parametrize("config", [{}, {"async_scheduling": "on"}], ids=["in turn", "ahead"])
def test_padded_and_replayed_steps_have_the_bits_of_eager_ones(directory, config):
    """Seven sequences are more than there is a graph for; as they end, batches of 5 down to 1 are replayed."""
    made = []
    bench = bench_with_graphs(directory, lambda: made.append(Recorded()) or made[-1], **config)
    bench.run(*(asked := requests(7)))
    eager = Bench(directory, kernels="fma")
    eager.run(*(expected := requests(7)))
    assert told(bench, asked) == told(eager, expected)
    assert len(made) == 4, "for 5, 4, 2 and 1 rows"
    assert sum(graph.num_replays for graph in made) >= 8
    assert all(graph.num_replays for graph in made)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    random_mixtral(num_local_experts=8, **SIZES).bfloat16().save_pretrained(directory, save_original_format=True)
    return directory


@needs_numba
@pytest.mark.parametrize("config", [{}, {"async_scheduling": "on"}], ids=["in turn", "ahead"])
def test_with_experts_elsewhere_each_piece_between_dispatches_is_replayed(mixtral, config):
    """Rows of padding are sent to nobody, and counted nowhere."""
    made = []
    bench, transport = bench_with_pieces(mixtral, lambda: made.append(Recorded()) or made[-1], **config)
    dispatcher, num_layers = bench.engine.model_runner.decoder.dispatcher, len(bench.engine.model_runner.decoder.layers)
    bench.run(*(asked := requests(7)))
    eager = Bench(mixtral, num_groups=2, kernels="fma", **config)
    eager.run(*(expected := requests(7)))
    assert told(bench, asked) == told(eager, expected)
    assert len(made) == 4 * (num_layers + 1), "for 5, 4, 2 and 1 rows"
    assert all(graph.num_replays for graph in made)
    assert dispatcher.rows_per_expert == eager.engine.model_runner.decoder.dispatcher.rows_per_expert
    assert sum(dispatcher.rows_per_expert) == 2 * sum(transport.sent)


@needs_numba
def test_a_step_whose_experts_are_away_fails_and_its_graphs_are_kept(mixtral):
    made = []
    bench, transport = bench_with_pieces(mixtral, lambda: made.append(Recorded()) or made[-1])
    expected = bench.run(make_request(prompt(9), max_tokens=6, ignore_eos=True))
    captured = len(made)
    bench.add(failing := make_request(prompt(9), max_tokens=6, ignore_eos=True))
    bench.engine.step()
    bench.engine.step()
    transport.is_away = True
    bench.engine.step()
    assert isinstance(bench.errors[failing.key], ExpertUnavailable)
    transport.is_away = False
    assert bench.run(make_request(prompt(9), max_tokens=6, ignore_eos=True)) == expected
    assert len(made) == captured


@needs_numba
def test_all_sizes_are_captured_at_start_and_no_step_captures(directory):
    made = []
    bench = bench_with_graphs(directory, lambda: made.append(Recorded()) or made[-1])
    runner = bench.engine.model_runner
    runner.graphs.capture()
    assert runner.graphs.num_captured == len(made) == 4, "for 5, 4, 2 and 1 rows"
    bench.run(*(asked := requests(7)))
    eager = Bench(directory, kernels="fma")
    eager.run(*(expected := requests(7)))
    assert told(bench, asked) == told(eager, expected)
    assert len(made) == 4


class Driver:
    """In place of `torch.cuda.CUDAGraph`: what it is told, in order. A capture that went wrong cannot end well."""

    def __init__(self):
        self.told = []
        self.is_broken = False

    def capture_begin(self, **how):
        self.told.append(("begin", how))

    def capture_end(self):
        self.told.append("end")
        if self.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.told.append("replay")


def test_a_capture_ends_whatever_happens_in_it_and_says_what_did(monkeypatch):
    """What torch says of a capture that was left open hid that memory was short: graphs were off for good."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: driver)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(stream))
    graph = graphs.CudaGraph("pool", "stream")
    assert graph.capture(lambda: driver.told.append("run") or 7) == 7
    graph.replay()
    begun = ("begin", {"pool": "pool", "capture_error_mode": "thread_local"})
    assert driver.told == [begun, "run", "end", "replay"]
    driver.told.clear()
    driver.is_broken = True

    def short():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        graph.capture(short)
    assert driver.told == [begun, "end"]


@needs_numba
@pytest.mark.parametrize(("taken", "warns"), [(5 * 2**20, False), (50 * 2**20, True)])
def test_what_captured_steps_take_is_told_beside_what_was_kept_for_them(directory, caplog, monkeypatch, taken, warns):
    free = iter([2**30, 2**30 - taken])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 2**34))
    bench = bench_with_graphs(directory, Recorded)
    with caplog.at_level(logging.INFO):
        capture(bench.engine.model_runner.graphs, torch.device("cuda"), 2**24)
    told = [record for record in caplog.records if record.name == "router_service.model.warm_up"]
    assert "of 4 batch sizes, captured in" in told[0].message
    assert f"they take {gib(taken)} of the {gib(2**24)} that" in told[0].message
    assert [record.levelname for record in told] == ["INFO", *["WARNING"] * warns]


@needs_numba
def test_where_memory_is_short_that_size_runs_eagerly_and_is_tried_again_later(directory, caplog, monkeypatch):
    """Graphs were off for good after one that found no memory, though a neighbour may have been loading."""
    monkeypatch.setattr(graphs, "STEPS_BETWEEN_TRIES", 2)
    attempts, is_short = [], True

    class Short(Recorded):
        def capture(self, run):
            result = super().capture(run)
            if isinstance(result, torch.Tensor) and len(result) == 4:
                attempts.append(1)
                if is_short:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return result

    bench = bench_with_graphs(directory, Short)
    with caplog.at_level(logging.WARNING):
        bench.engine.model_runner.graphs.capture()
        bench.run(*(asked := requests(3)))
    assert bench.engine.model_runner.graphs.num_captured == 3, "all but the one of 4 rows"
    assert len(attempts) == 2, "at start, and after two steps"
    assert [record.message for record in caplog.records if "memory" in record.message] == [
        "memory was short to capture a step of 4 rows: such steps are slower, their launches one by one"
    ]
    is_short = False
    bench.run(*(more := requests(3)))
    assert bench.engine.model_runner.graphs.num_captured == 4
    eager = Bench(directory, kernels="fma")
    for mine in (asked, more):
        eager.run(*(expected := requests(3)))
        assert told(bench, mine) == told(eager, expected)


@needs_numba
@pytest.mark.parametrize("asked", [{"routed_experts": True}, {"pooling": "mean"}, {"prompt_logprobs": 1}])
def test_what_a_graph_does_not_yield_is_computed_without_one(directory, asked):
    bench = bench_with_graphs(directory, lambda: pytest.fail("a prompt was captured"))
    bench.run(make_request(prompt(9), max_tokens=1, **asked))
    assert not bench.errors
    if "routed_experts" in asked:
        bench.run(make_request(prompt(9), max_tokens=3, **asked))


@needs_numba
def test_what_cannot_be_captured_is_run_eagerly_from_then_on_with_one_warning(directory, caplog):
    class Refusing(Recorded):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    attempts = []
    bench = bench_with_graphs(directory, lambda: attempts.append(1) or Refusing())
    with caplog.at_level(logging.WARNING):
        bench.run(*(asked := requests(3)))
    eager = Bench(directory, kernels="fma")
    eager.run(*(expected := requests(3)))
    assert told(bench, asked) == told(eager, expected)
    assert len(attempts) == 1
    assert [record.message for record in caplog.records if "captured" in record.message] == [
        "a step of 4 rows could not be captured (RuntimeError('operation not permitted when stream is capturing')): "
        "no CUDA graphs from here on"
    ]


@needs_numba
def test_a_graph_whose_replay_failed_is_captured_anew(directory):
    made = []

    class Failing(Recorded):
        def replay(self):
            if len(made) == 1 and self.num_replays:
                raise RuntimeError("injected")
            super().replay()

    bench = bench_with_graphs(directory, lambda: made.append(Failing()) or made[-1])
    bench.run(failing := make_request(prompt(9), max_tokens=6, ignore_eos=True))
    assert list(bench.errors) == [failing.key]
    bench.run(later := make_request(prompt(9), max_tokens=6, ignore_eos=True))
    assert len(bench.token_ids(later)) == 6
    assert len(made) == 2


def test_sizes_are_those_of_few_graphs_and_the_largest_fits_all():
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(1) == [1]
    assert graph_sizes(100)[-3:] == [80, 96, 100]


def test_their_memory_is_kept_free(directory):
    architecture = Bench(directory).engine.model_runner.decoder.architecture
    few, many = (
        graph_bytes(architecture, "bfloat16", max_num_seqs=n, max_model_len=512, local_experts=True) for n in (1, 64)
    )
    assert 2**24 < few < many


def test_where_there_can_be_none_they_are_not_and_on_is_refused(directory):
    assert Bench(directory, cuda_graphs="auto").engine.model_runner.graphs is None
    with pytest.raises(ConfigError, match=r"engine.cuda_graphs: on needs a GPU, one microbatch"):
        Bench(directory, cuda_graphs="on")
    assert EngineConfig().cuda_graphs == "auto"


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", ["off", "on"])
def test_on_a_card_captured_steps_give_the_tokens_of_eager_ones(directory, ahead):
    """The same kernels on the same rows and no others but padding: to the bit, where a row hangs on no other."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    captured = Bench(directory, device="cuda", cuda_graphs="auto", async_scheduling=ahead)
    if captured.engine.model_runner.graphs is None:
        pytest.skip("attention cannot be captured here")
    eager = Bench(directory, device="cuda", cuda_graphs="off", async_scheduling="off")
    assert captured.run(*requests(7)) == eager.run(*requests(7))
    assert captured.engine.model_runner.graphs.num_captured == len(graph_sizes(64)), "it fell back to eager steps"
