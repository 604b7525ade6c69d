"""Embeddings of the engine against transformers' hidden states pooled by hand, however the work is cut or shared."""

import itertools
import random

import pytest
import torch

from cluster.deadline import Deadline
from cluster.errors import DeadlineExceeded, EngineDead
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench, cut_by
from tests.router_service.requests import make_request

LENGTHS = (1, 2, 16, 17, 40, 90, 300)


@pytest.fixture(scope="module", params=["dense", "experts"])
def tiny(request, tmp_path_factory):
    """A random tiny Mistral, or Mixtral, and the reference."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, write_checkpoint(directory, dense=request.param == "dense")


def prompt(length):
    """Prompts of different lengths share their beginnings, as far as a prefix cache could be tempted."""
    return random.Random(0).choices(range(3, 90), k=length)


def by_hand(model, pooling, length):
    with torch.inference_mode():
        hidden = model.model(torch.tensor([prompt(length)])).last_hidden_state[0]  # [T, D]
    return hidden.mean(0) if pooling == "mean" else hidden[-1]


def generating():
    """Requests of others."""
    return [make_request(prompt(90 + i)[i:], max_tokens=100, ignore_eos=True) for i in range(6)]


@pytest.fixture(scope="module")
def alone(tiny, device):
    """What each of them gets by itself."""
    return Bench(tiny[0], device=device).one_by_one(*generating())


@cut_by("together", "chunked-prefill", "token-by-token", "one-at-a-time", "preempted-in-chunks", "two-microbatches")
def test_they_are_the_hidden_states_pooled_by_hand(tiny, alone, config, device):
    directory, model = tiny
    bench = Bench(directory, device=device, **config)
    bench.run(make_request(prompt(300), max_tokens=1))  # the prefix cache has their beginning
    generated, asked = generating(), list(itertools.product(("mean", "last"), LENGTHS))
    requests = {(pooling, length): make_request(prompt(length), pooling=pooling) for pooling, length in asked}
    outputs = bench.run(*generated[:3], *requests.values(), *generated[3:])
    for (pooling, length), request in requests.items():
        embedding = bench.embeddings[request.key]
        torch.testing.assert_close(embedding, by_hand(model, pooling, length), atol=1e-3, rtol=0)
        assert not bench.chunks[request.key], "nothing is generated"
    assert [*outputs[:3], *outputs[-3:]] == alone, "others get their own tokens"
    stats = bench.engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.num_kv_blocks_used) == (0, 0, 0)
    if config.get("num_kv_blocks") == 34:
        assert stats.preemptions_total > 0, "the test is meant to preempt"


def test_nothing_is_sampled_for_them(tiny):
    bench = Bench(tiny[0])
    request = make_request(prompt(20), pooling="mean")
    bench.run(request)
    assert bench.engine.stats().generation_tokens_total == 0
    assert bench.engine.stats().prompt_tokens_total == 20


def test_a_late_one_fails_and_an_aborted_one_leaves_nothing(tiny):
    bench = Bench(tiny[0], max_num_batched_tokens=16)
    late = make_request(prompt(40), pooling="mean", deadline=Deadline.after(-1))
    bench.run(late)
    assert isinstance(bench.errors[late.key], DeadlineExceeded)
    aborted = make_request(prompt(40), pooling="mean")
    bench.add(aborted)
    bench.engine.step()
    assert bench.engine.stats().num_kv_blocks_used > 0
    bench.engine.abort(aborted.key)
    bench.engine._take_pending_commands()
    bench.engine.step()
    assert aborted.key not in bench.embeddings
    assert bench.engine.stats().num_kv_blocks_used == 0


def test_an_engine_that_dies_fails_them(tiny):
    bench = Bench(tiny[0])

    def explode():
        raise RuntimeError("a bug")

    bench.engine.scheduler.schedule = explode
    bench.engine.start()
    request = make_request(prompt(5), pooling="last")
    bench.engine.submit(request)
    bench.engine._thread.join(10)
    assert isinstance(bench.errors[request.key], EngineDead)
