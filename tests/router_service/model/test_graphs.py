"""Captured steps against eager ones: on a CPU by graphs that run the recorded function again, on a GPU by CUDA's."""

from __future__ import annotations

import logging

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from cluster.planning.step_memory import graph_bytes, graph_sizes
from experts_service.kernels.compiled import jit
from router_service.attention.backend import StaticPlan
from router_service.model.graphs import DecodeGraphs, whole_step
from tests.checkpoints import random_mistral, random_mixtral
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.router_service.test_engine import prompt

LARGEST = 5
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 300}


class Recorded:
    """Runs what it captured again, and leaves the result where the first one lay. As CUDA's, it has no other input."""

    def __init__(self):
        self.num_replays = 0

    def capture(self, run):
        self.run = run
        self.result = run().clone().fill_(float("nan"))  # capturing computes nothing
        return self.result

    def replay(self):
        self.num_replays += 1
        self.result.copy_(self.run())


class Padded(StaticPlan):
    """Plans of another backend for the rows that there are; those behind them write nothing, and see zeros."""

    def __init__(self, backend, num_sequences):
        self.backend, self.num_sequences = backend, num_sequences

    def update(self, metadata):
        self.plan, self.num_rows = self.backend.plan(metadata), len(metadata.positions)
        assert self.num_rows <= self.num_sequences

    def write(self, layer, keys, values, kv_cache):
        raise AssertionError("attend does both")

    read = write

    def attend(self, layer, queries, keys, values, kv_cache):
        n = self.num_rows
        attended = torch.zeros_like(queries)
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
    runner = bench.engine.model_runner
    runner.graphs = DecodeGraphs(
        whole_step(runner.decoder, runner.kv_cache),
        lambda size: Padded(runner.attention, size),
        new_graph,
        max_num_seqs=LARGEST,
        device=torch.device("cpu"),
    )
    return bench


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
    graphs = []
    bench = bench_with_graphs(directory, lambda: graphs.append(Recorded()) or graphs[-1], **config)
    bench.run(*(asked := requests(7)))
    eager = Bench(directory, kernels="fma")
    eager.run(*(expected := requests(7)))
    assert told(bench, asked) == told(eager, expected)
    assert len(graphs) == 4, "for 5, 4, 2 and 1 rows"
    assert sum(graph.num_replays for graph in graphs) >= 8
    assert all(graph.num_replays for graph in graphs)


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
    graphs = []

    class Failing(Recorded):
        def replay(self):
            if len(graphs) == 1 and self.num_replays:
                raise RuntimeError("injected")
            super().replay()

    bench = bench_with_graphs(directory, lambda: graphs.append(Failing()) or graphs[-1])
    bench.run(failing := make_request(prompt(9), max_tokens=6, ignore_eos=True))
    assert list(bench.errors) == [failing.key]
    bench.run(later := make_request(prompt(9), max_tokens=6, ignore_eos=True))
    assert len(bench.token_ids(later)) == 6
    assert len(graphs) == 2


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
    with pytest.raises(ConfigError, match=r"engine.cuda_graphs: on needs a GPU"):
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
    assert captured.engine.model_runner.graphs._captured, "it fell back to eager steps"
