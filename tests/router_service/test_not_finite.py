"""NaN in an expert's answer: the requests that it reached fail, no others, and nothing of it stays behind."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import Unavailable
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


class Damaging:
    """A transport that answers NaN for the first row of a step, while it is armed."""

    armed = False

    def __init__(self, inner):
        self.send_on = inner.send

    def send(self, layer, rows, parts):
        flight = self.send_on(layer, rows, parts)
        for part in parts:
            if self.armed and layer == 1:
                part.answer[torch.from_numpy(part.row_indices == 0).to(rows.device)] = float("nan")
        return flight


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_requests_that_it_reached_fail(tmp_path, temperature, device):
    write_checkpoint(tmp_path)
    bench = Bench(tmp_path, dtype="float32", device=device)
    dispatcher = bench.engine.model_runner.decoder.dispatcher
    transport = dispatcher._transport = Damaging(dispatcher._transport)
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
    cache = bench.engine.model_runner.kv_cache
    assert torch.isfinite(cache._keys).all()
    assert torch.isfinite(cache._values).all()
    assert bench.run(make_request(prompts[0], temperature=temperature, seed=7)) == expected[:1]
