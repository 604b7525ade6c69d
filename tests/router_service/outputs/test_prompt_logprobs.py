"""Log-probabilities of prompt tokens against transformers, however the prompts are cut, batched or cached."""

import random

import pytest
import torch

from cluster.planning.step_memory import SCORED_ROWS
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench, cut_by
from tests.router_service.requests import make_request

LENGTHS = (1, 2, 17, 40, 90, SCORED_ROWS + 70)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return directory, write_checkpoint(directory, num_local_experts=8)


def prompt(length):
    """Prompts of different lengths share their beginnings."""
    return random.Random(0).choices(range(3, 90), k=length)


@pytest.fixture(scope="module")
def reference(tiny):
    """Log-probabilities [T, V] of every prompt, row p those of the token at p + 1."""
    with torch.inference_mode():
        return {n: tiny[1](torch.tensor([prompt(n)])).logits[0].log_softmax(-1) for n in LENGTHS}


def check(chunk, length, reference):
    ids = prompt(length)
    first, *scores = chunk.prompt_logprobs
    assert first is None
    assert len(scores) == length - 1
    for position, score in enumerate(scores):
        row = reference[length][position]
        assert score.token_logprob == pytest.approx(row[ids[position + 1]].item(), abs=1e-4)
        assert [logprob for _, logprob in score.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert sum(score.token_logprob for score in scores) == pytest.approx(
        sum(reference[length][position][ids[position + 1]].item() for position in range(length - 1)), abs=1e-3
    )


@cut_by(
    "together",
    "chunked-prefill",
    "token-by-token",
    "one-at-a-time",
    "preempted-in-chunks",
    "two-microbatches",
    "four-groups",
)
def test_scores_are_those_of_the_reference_however_the_work_is_cut(tiny, reference, config, device):
    bench = Bench(tiny[0], device=device, **config)
    bench.run(make_request(prompt(90), max_tokens=1))  # the prefix cache has their beginning
    requests = {n: make_request(prompt(n), max_tokens=20, ignore_eos=True, prompt_logprobs=3) for n in LENGTHS}
    others = [make_request(prompt(60), max_tokens=100, ignore_eos=True) for _ in range(3)]
    outputs = bench.run(*requests.values(), *others)
    for length, request in requests.items():
        first, *rest = bench.chunks[request.key]
        check(first, length, reference)
        assert first.num_cached_tokens == 0
        assert all(chunk.prompt_logprobs is None for chunk in rest)
    assert all(chunk.prompt_logprobs is None for other in others for chunk in bench.chunks[other.key])
    plain = [make_request(prompt(n), max_tokens=20, ignore_eos=True) for n in LENGTHS]
    assert outputs[: len(plain)] == bench.run(*plain), "the scores change no token"
    if config.get("num_kv_blocks") == 34:
        assert bench.engine.stats().preemptions_total > 0, "the test is meant to preempt"


def test_a_resumed_request_scores_nothing_again(tiny):
    bench = Bench(tiny[0])
    resumed = make_request(prompt(20), output=[5, 6], max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    bench.run(resumed)
    assert bench.chunks[resumed.key][0].prompt_logprobs is None
