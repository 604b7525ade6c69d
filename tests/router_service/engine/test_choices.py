"""The choices of one request: their prompt is computed once, and each gets the tokens that it gets alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench, cut_by
from tests.router_service.requests import make_request

PROMPT = random.Random(0).choices(range(3, 90), k=200)
TAIL = 200 % 16  # after the last full block: each choice computes it for itself
NUM_CHOICES = 8
COMPUTED_ONCE = len(PROMPT) + (NUM_CHOICES - 1) * TAIL


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def alone(directory):
    """What each choice gets when nothing is shared."""
    return Bench(directory, prefix_caching=False, block_size=16).one_by_one(*choices())


def choices(outputs=((),) * NUM_CHOICES):
    fields = {"request_id": "one", "seed": 7, "temperature": 1.0, "max_tokens": 45, "ignore_eos": True}
    return [make_request(PROMPT, output=output, choice_index=index, **fields) for index, output in enumerate(outputs)]


@cut_by("together", "chunked-prefill", "three-at-a-time", "preempted", "preempted-in-chunks", "two-microbatches")
def test_they_are_those_of_each_alone(directory, alone, config):
    bench = Bench(directory, **{"block_size": 16, **config})
    assert len({tuple(tokens) for tokens in alone}) > 1, "they are drawn"
    assert bench.run(*choices()) == alone
    stats = bench.engine.stats()
    if "num_kv_blocks" in config:
        assert stats.preemptions_total > 0, "the test is meant to preempt"
    else:
        assert stats.prompt_tokens_total == COMPUTED_ONCE


def test_a_prompt_that_is_scored_for_the_first_is_computed_once_as_well(directory, alone):
    bench = Bench(directory, block_size=16)
    first, *others = choices()
    scored = replace(first, sampling=replace(first.sampling, prompt_logprobs=2))
    assert bench.run(scored, *others) == alone
    assert len(bench.chunks[scored.key][0].prompt_logprobs) == len(PROMPT)
    assert bench.engine.stats().prompt_tokens_total == COMPUTED_ONCE


def test_without_a_prefix_cache_nothing_is_shared(directory, alone):
    bench = Bench(directory, prefix_caching=False)
    assert bench.run(*choices()) == alone
    assert bench.engine.stats().prompt_tokens_total == NUM_CHOICES * len(PROMPT)


def test_when_the_first_leaves_in_its_prompt_the_next_goes_on_from_there(directory, alone):
    bench = Bench(directory, block_size=16, max_num_batched_tokens=64)
    first, *others = asked = choices()
    bench.add(*asked)
    for _ in range(2):
        bench.engine.step()
    bench.engine._abort(first.key)
    assert bench.run() == []
    assert [bench.token_ids(request) for request in others] == alone[1:]
    assert bench.engine.stats().prompt_tokens_total == COMPUTED_ONCE - TAIL
    assert bench.engine.stats().num_kv_blocks_used == 0


def test_resumed_ones_share_their_prompt_as_well(directory, alone):
    """Their coordinator has died, each at another token; the next one has computed none of it."""
    bench = Bench(directory, block_size=16)
    resumed = choices([tokens[:index] for index, tokens in enumerate(alone)])
    assert bench.run(*resumed) == [tokens[index:] for index, tokens in enumerate(alone)]
    assert bench.engine.stats().prompt_tokens_total == COMPUTED_ONCE


def test_another_tenant_does_not_wait_for_them(directory):
    bench = Bench(directory, block_size=16, max_num_batched_tokens=64)
    bench.add(*choices())
    bench.engine.step()
    bench.add(other := make_request(range(3, 20), max_tokens=1, cache_salt="bob"))
    bench.engine.step()
    assert len(bench.token_ids(other)) == 1
