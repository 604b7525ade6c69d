"""NaN in an expert's answer: the requests that it reached fail, no others, and nothing of it stays behind."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import Unavailable
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


class Damaging:
    """A transport that answers NaN for one row of a step, the first, in one layer, while it is armed."""

    armed = False

    def __init__(self, bench, layer, row=0):
        dispatcher = bench.engine.model_runner.decoder.dispatcher
        self.send_on = dispatcher._transport.send
        self.layer, self.row = layer, row
        dispatcher._transport = self

    def send(self, layer, rows, parts):
        flight = self.send_on(layer, rows, parts)
        for part in parts:
            if self.armed and layer == self.layer:
                part.answer[torch.from_numpy(part.row_indices == self.row).to(rows.device)] = float("nan")
        return flight


def null_block_is_zero(bench):
    cache = bench.engine.model_runner.kv_cache
    return not any(memory[:, : cache.block_size].any() for memory in (cache._keys, cache._values))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_requests_that_it_reached_fail(tmp_path, temperature, device):
    write_checkpoint(tmp_path)
    bench = Bench(tmp_path, dtype="float32", device=device)
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
    """Decodes are padded to the longest, and read the first slot of the cache for it: a block of the failing prompt."""
    write_checkpoint(tmp_path)
    prompts = [range(5, 8), range(6, 40), range(7, 107)]  # 1, 3 and 7 blocks

    def others():
        return [make_request([token % 90 for token in prompt], max_tokens=8, ignore_eos=True) for prompt in prompts]

    expected = Bench(tmp_path, dtype="float32", device=device).run(*others())
    bench = Bench(tmp_path, dtype="float32", device=device, num_kv_blocks=12, max_model_len=128)
    transport = Damaging(bench, layer=0, row=3)
    bench.add(make_request([5, 6], max_tokens=1), *(asked := others()))  # the first block, and all others
    bench.engine.step()
    bench.add(damaged := make_request(range(10, 20)))  # it has the first block now
    transport.armed = True
    bench.engine.step()
    transport.armed = False
    bench.run()
    assert list(bench.errors) == [damaged.key]
    assert [bench.token_ids(other) for other in asked] == expected
    assert null_block_is_zero(bench)
