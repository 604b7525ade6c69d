"""NaN in an expert's answer: the requests that it reached fail, no others, and nothing of it stays behind."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import Unavailable
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


class Damaging:
    """Answers NaN for one row of a step, the first, in one layer, while it is armed."""

    armed = False

    def __init__(self, bench, layer, row=0):
        dispatcher = bench.engine.model_runner.decoder.dispatcher
        self.layer, self.row = layer, row
        if dispatcher.waits_for_nobody:  # on a GPU nothing is sent
            self.combine_on = dispatcher.combine
            dispatcher.combine = self.combine
        else:
            self.send_on = dispatcher._transport.send
            dispatcher._transport = self

    def send(self, layer, rows, parts):
        flight = self.send_on(layer, rows, parts)
        for part in parts:
            if self.armed and layer == self.layer:
                part.answer[torch.from_numpy(part.row_indices == self.row).to(rows.device)] = float("nan")
        return flight

    def combine(self, dispatch, weights):
        total = self.combine_on(dispatch, weights)
        if self.armed and dispatch.layer == self.layer:
            total[self.row] = float("nan")
        return total


def a_bench(directory, device, **settings):
    """Whose steps are launched one by one: a graph that was captured before is damaged by nobody."""
    return Bench(directory, dtype="float32", device=device, cuda_graphs="off", **settings)


def step(bench, device):
    """One, and on a GPU another: what a step says is read in the next."""
    bench.engine.step()
    if device == "cuda":
        bench.engine.step()


def null_block_is_zero(bench):
    cache = bench.engine.model_runner.kv_cache
    return not any(memory[:, 0].any() for memory in (cache.keys, cache.values))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_requests_that_it_reached_fail(tmp_path, temperature, device):
    write_checkpoint(tmp_path)
    bench = a_bench(tmp_path, device)
    transport = Damaging(bench, layer=1)
    prompts = [range(5 + i, 45 + i) for i in range(3)]
    expected = bench.one_by_one(*(make_request(prompt, temperature=temperature, seed=7) for prompt in prompts))
    first, *others = asked = [make_request(prompt, temperature=temperature, seed=7) for prompt in prompts]
    bench.add(*asked)
    for armed in (False, False, True, False):
        transport.armed = armed
        bench.engine.step()
    bench.run()
    assert list(bench.errors) == [first.key]
    assert isinstance(bench.errors[first.key], Unavailable)
    assert bench.token_ids(first) == expected[0][: len(bench.token_ids(first))]
    assert [bench.token_ids(other) for other in others] == expected[1:]
    assert null_block_is_zero(bench)
    assert bench.run(make_request(prompts[0], temperature=temperature, seed=7)) == expected[:1]


def test_a_prefill_that_is_not_finite_fails_nobody_who_decodes_beside_it(tmp_path, device):
    """Decodes are padded to the longest. What padding read was the first slot of a block that somebody had.

    Here whatever is in no block of a sequence that runs, and is not the null block, is NaN from the start.
    """
    write_checkpoint(tmp_path)
    prompts = [range(5, 8), range(6, 40), range(7, 107)]  # 1, 3 and 7 blocks

    def others():
        return [make_request([token % 90 for token in prompt], max_tokens=8, ignore_eos=True) for prompt in prompts]

    expected = a_bench(tmp_path, device).run(*others())
    bench = a_bench(tmp_path, device)
    cache = bench.engine.model_runner.kv_cache
    for memory in (cache.keys, cache.values):
        memory[:, 1:] = float("nan")
    bench.add(*(asked := others()))
    bench.engine.step()
    bench.add(damaged := make_request(range(10, 20)))
    transport = Damaging(bench, layer=0, row=len(asked))  # the first after those that decode
    transport.armed = True
    bench.engine.step()
    transport.armed = False
    bench.run()
    assert list(bench.errors) == [damaged.key]
    assert [bench.token_ids(other) for other in asked] == expected
    assert null_block_is_zero(bench)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_chunk_that_nobody_samples_from_is_checked_before_others_can_share_it(tmp_path, layer, device):
    """The first half of a prompt was never looked at, but published: whoever began alike failed as well."""
    write_checkpoint(tmp_path)
    prompt = [token % 90 for token in range(5, 65)]
    [expected] = a_bench(tmp_path, device).run(make_request(prompt))
    bench = a_bench(tmp_path, device, max_num_batched_tokens=32)
    transport = Damaging(bench, layer)
    bench.add(damaged := make_request(prompt))
    transport.armed = True
    bench.engine.step()
    transport.armed = False
    if device == "cuda":
        bench.engine.step()
    assert list(bench.errors) == [damaged.key], "it fails in the step in which it is damaged, or is known to be"
    assert not bench.chunks[damaged.key]
    innocent = make_request(prompt)
    assert bench.run(innocent) == [expected]
    assert bench.chunks[innocent.key][0].num_cached_tokens == 0


def test_shared_blocks_of_a_failed_sequence_are_not_shared_again(tmp_path, device):
    """The cache forgot them, but another sequence that held them published them once more."""
    write_checkpoint(tmp_path)
    prompt = [token % 90 for token in range(5, 38)]  # two blocks, and one token
    bench = a_bench(tmp_path, device)
    transport = Damaging(bench, layer=1)
    bench.run(make_request(prompt, max_tokens=1))
    failing, sharing = make_request(prompt, ignore_eos=True), make_request(prompt, ignore_eos=True)
    bench.add(failing, sharing)
    step(bench, device)
    assert [bench.chunks[request.key][0].num_cached_tokens for request in (failing, sharing)] == [32, 32]
    transport.armed = True
    bench.engine.step()
    transport.armed = False
    bench.engine.step()
    assert list(bench.errors) == [failing.key]
    later = make_request(prompt)
    bench.run(later)
    assert bench.chunks[later.key][0].num_cached_tokens == 0
    assert bench.token_ids(later) == bench.token_ids(sharing)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_an_embedding_that_is_not_finite_is_an_error(tmp_path, pooling, chunk, device):
    """It was returned as a success. Also where only its first chunk was damaged, which `last` does not even pool."""
    write_checkpoint(tmp_path)
    bench = a_bench(tmp_path, device, max_num_batched_tokens=chunk)
    transport = Damaging(bench, layer=0)
    bench.add(damaged := make_request(range(5, 45), pooling=pooling))
    transport.armed = True
    bench.engine.step()
    transport.armed = False
    bench.run(whole := make_request(range(5, 45), pooling=pooling))
    assert isinstance(bench.errors[damaged.key], Unavailable)
    assert list(bench.embeddings) == [whole.key]
    assert torch.isfinite(bench.embeddings[whole.key]).all()


def test_neither_is_one_whose_last_norm_is_damaged(tmp_path, monkeypatch, device):
    write_checkpoint(tmp_path)
    bench = a_bench(tmp_path, device)
    bench.engine.model_runner.decoder.norm[3] = float("inf")
    bench.run(damaged := make_request(range(5, 45), pooling="mean"))
    assert isinstance(bench.errors[damaged.key], Unavailable)
    assert not bench.embeddings


def test_scores_of_a_prompt_that_are_not_finite_end_its_request_alone(tmp_path, monkeypatch, device):
    write_checkpoint(tmp_path)
    bench = a_bench(tmp_path, device)
    decoder = bench.engine.model_runner.decoder
    real = decoder.logits
    scored, other = make_request(range(5, 45), prompt_logprobs=1), make_request(range(5, 45))

    def logits(hidden):
        result = real(hidden)
        if len(hidden) > 2:  # those of the prompt
            result[7] = float("nan")
        return result

    monkeypatch.setattr(decoder, "logits", logits)
    bench.run(scored, other)
    assert list(bench.errors) == [scored.key]
    assert isinstance(bench.errors[scored.key], Unavailable)
    assert not bench.chunks[scored.key]
