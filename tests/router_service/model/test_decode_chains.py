"""A step in chains has the bits of a step whose parts are called one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experts_service.kernels.compiled import jit
from router_service.dispatcher import Dispatcher
from router_service.model import decoder
from router_service.model.decode_chains import KEPT, MOST_ROWS, DecodeChains
from router_service.model.decoder import Decoder
from tests.checkpoints import random_mistral, random_mixtral
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 300}
NONE, HALVES, LAYERS, TIMED, ALL = (
    "one by one", "but for the experts", "but for attention", "layer by layer", "the whole step",
)  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("experts", "dense")}
    for name, directory in made.items():
        model = random_mistral(**SIZES) if name == "dense" else random_mixtral(num_local_experts=8, **SIZES)
        model.bfloat16().save_pretrained(directory, save_original_format=True)
    return made


class Steps:
    """What three requests see, whose prompts are few rows as well."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, way: str, **config: Any) -> None:
        self.logits: list[torch.Tensor] = []
        self.chained = {LAYERS: 0, ALL: 0}  # calls
        of_hidden = Decoder.logits

        def watched(model: Decoder, hidden: torch.Tensor) -> torch.Tensor:
            self.logits.append(of_hidden(model, hidden).clone())
            return self.logits[-1]

        def counted(call: Any, what: str) -> Any:
            def run(*args: Any) -> None:
                self.chained[what] += 1
                call(*args)

            return run

        before = torch.get_num_threads()
        with monkeypatch.context() as context:
            context.setattr(decoder, "MOST_ROWS", 0 if way is NONE else MOST_ROWS)
            context.setattr(Decoder, "logits", watched)
            context.setattr(DecodeChains, "feed_forward", counted(DecodeChains.feed_forward, LAYERS))
            context.setattr(DecodeChains, "run", counted(DecodeChains.run, ALL))
            context.setattr(Decoder, "chains_attention", way in (HALVES, TIMED, ALL))
            if way is HALVES:  # as where experts are elsewhere
                context.setattr(Dispatcher, "chained", lambda _dispatcher, _layer: None)
            bench = Bench(directory, prefix_caching=False, num_threads=3, **config)
            bench.engine.model_runner.decoder.layer_times.wanted = way is TIMED
            requests = [make_request(range(3, 9 + 5 * i), max_tokens=8, ignore_eos=True) for i in range(3)]
            bench.run(*requests)
        torch.set_num_threads(before)
        assert not bench.errors
        self.decoder = bench.engine.model_runner.decoder
        assert bool(self.decoder._chains) is (way is not NONE)
        self.rows_per_expert = self.decoder.dispatcher.rows_per_expert


CONFIGS: list[dict[str, Any]] = [
    {},
    {"microbatches": 3},
    {"num_groups": 4},
    {"quantization": "int8"},
    {"quantization": "fp8"},
    {"quantization": "int4", "quantized_parts": "attention"},
    {"quantization": "int4", "quantization_group_size": 32, "num_groups": 2},
    {"kv_cache_dtype": "int8"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_it_has_the_same_bits(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    """Three microbatches of one row each have buffers of their own."""
    ways = (NONE, HALVES, LAYERS, TIMED, ALL)
    expected, *others = runs = [Steps(directories["experts"], monkeypatch, way, **config) for way in ways]
    assert len(expected.logits) >= 8
    assert [steps.chained[LAYERS] > 0 for steps in runs] == [False, False, True, True, False]
    assert [steps.chained[ALL] > 0 for steps in runs] == [False, False, False, False, True]
    for steps in others:
        assert steps.rows_per_expert == expected.rows_per_expert
        assert all(map(torch.equal, steps.logits, expected.logits))
        assert len(steps.logits) == len(expected.logits)


@pytest.mark.parametrize("config", [{}, {"quantization": "int8"}])
def test_so_has_a_dense_model(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    expected, *others = (Steps(directories["dense"], monkeypatch, way, **config) for way in (NONE, LAYERS, ALL))
    for steps in others:
        assert all(map(torch.equal, steps.logits, expected.logits))
        assert len(steps.logits) == len(expected.logits) >= 8


def test_what_the_gate_is_in_doubt_about_is_torchs_choice(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts score alike: the chain halts in every layer, and goes on with what torch chose."""
    for way in (HALVES, LAYERS, ALL):
        with monkeypatch.context() as context:
            context.setattr("router_service.model.gate.Linear", _Nothing)
            steps = Steps(directories["experts"], monkeypatch, way)
            expected = Steps(directories["experts"], monkeypatch, NONE)
        assert steps.rows_per_expert == expected.rows_per_expert
        assert all(map(torch.equal, steps.logits, expected.logits))
    assert steps.chained[ALL]


def _Nothing(weight: torch.Tensor, kernel: Any) -> Any:  # noqa: N802
    from experts_service.kernels.linear import Linear

    return Linear(torch.zeros_like(weight), kernel)


def test_buffers_of_few_numbers_of_rows_are_kept(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four sets of buffers of a large model took 100 MB."""
    bench = Bench(directories["experts"], prefix_caching=False)
    requests = [make_request([3, 4 + i], max_tokens=2 + i, ignore_eos=True) for i in range(KEPT + 4)]
    bench.run(*requests)
    assert len(bench.engine.model_runner.decoder._chains) == KEPT
