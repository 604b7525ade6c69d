"""A step in chains has the bits of a step whose parts are called one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts_service.kernels import jit
from router_service.model import decoder
from router_service.model.decode_chains import MOST_ROWS
from router_service.model.decoder import Decoder
from tests.checkpoints import random_mistral, random_mixtral
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 300}


@pytest.fixture(params=["experts", "dense"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = random_mistral(**SIZES) if request.param == "dense" else random_mixtral(num_local_experts=8, **SIZES)
    model.bfloat16().save_pretrained(tmp_path, save_original_format=True)
    return tmp_path


def logits(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, in_chains: bool, microbatches: int
) -> list[torch.Tensor]:
    """Of all steps of three requests, whose prompts are few rows as well."""
    monkeypatch.setattr(decoder, "MOST_ROWS", MOST_ROWS if in_chains else 0)
    bench = Bench(directory, prefix_caching=False, microbatches=microbatches, num_threads=3)
    seen = []
    of_hidden = Decoder.logits

    def watched(model: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(of_hidden(model, hidden).clone())
        return seen[-1]

    with monkeypatch.context() as context:
        context.setattr(Decoder, "logits", watched)
        bench.run(*(make_request(range(3, 9 + 5 * i), max_tokens=8, ignore_eos=True) for i in range(3)))
    assert not bench.errors
    assert bool(bench.engine.model_runner.decoder._chains) is in_chains
    return seen


@pytest.mark.parametrize("microbatches", [1, 3])
def test_it_has_the_same_bits(directory: Path, monkeypatch: pytest.MonkeyPatch, microbatches: int) -> None:
    """Three microbatches of one row each have buffers of their own."""
    before = torch.get_num_threads()
    try:
        chained, one_by_one = (
            logits(directory, monkeypatch, in_chains=in_chains, microbatches=microbatches)
            for in_chains in (True, False)
        )
    finally:
        torch.set_num_threads(before)
    assert len(chained) == len(one_by_one) >= 8
    for ours, expected in zip(chained, one_by_one, strict=True):
        assert torch.equal(ours, expected)
