"""Shared experts compute in the coordinator while rows are under way to the others: told by the order of events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router_service.dispatcher import Dispatch
from router_service.model.decoder import Decoder
from router_service.model.transformers_backend.decoder import TransformersDecoder
from tests import families
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.transformers_families import generated, prompt, write_family

NEW_TOKENS = 6
ROUND = ["sent", "shared experts", "combined"]  # of each layer and step


def noted(bench: Bench) -> list[str]:
    """What is to happen, in the order in which it happens."""
    events: list[str] = []
    decoder: Any = bench.engine.model_runner.decoder
    dispatcher = decoder.dispatcher
    dispatch, combine = dispatcher.dispatch, dispatcher.combine

    def noted_dispatch(*arguments: Any) -> Dispatch:
        sent: Dispatch = dispatch(*arguments)
        events.append("sent")
        return sent

    def noted_combine(*arguments: Any) -> Any:
        answers = combine(*arguments)
        events.append("combined")
        return answers

    dispatcher.dispatch, dispatcher.combine = noted_dispatch, noted_combine
    if isinstance(decoder, Decoder):
        note_native(decoder, events)
    else:
        note_modules(decoder, events)
    return events


def note_native(decoder: Decoder, events: list[str]) -> None:
    def of_layer(layer: Any) -> Any:
        if layer.gate is None:
            return layer

        def dense(rows: Any) -> Any:
            events.append("shared experts")
            return layer.dense(rows)

        return replace(layer, dense=dense)

    decoder.layers = [of_layer(layer) for layer in decoder.layers]


def note_modules(decoder: TransformersDecoder, events: list[str]) -> None:
    """The first matrix that shared experts multiply with, whoever calls them."""
    for name, module in decoder.model.named_modules():
        if name.endswith("shared_experts.up_proj"):
            module.register_forward_pre_hook(lambda *_: events.append("shared experts"))


def run(bench: Bench) -> tuple[list[str], list[list[int]]]:
    events = noted(bench)
    ids = bench.run(make_request(prompt(9), max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True))
    return events, ids


def test_of_a_native_family(tmp_path: Path) -> None:
    model = families.random_model("qwen2_moe")
    families.write_model(tmp_path, model)
    bench = Bench(tmp_path, num_groups=2)
    events, ids = run(bench)
    sparse = [layer for layer in bench.engine.model_runner.decoder.layers if layer.gate is not None]
    assert len(sparse) > 1
    assert events == ROUND * len(sparse) * NEW_TOKENS
    assert ids == [generated(model, prompt(9), NEW_TOKENS)]


@pytest.mark.parametrize("family", ["glm4_moe", "mistral4"])
def test_of_a_family_by_transformers_code(tmp_path: Path, family: str) -> None:
    """Its block asks them when the others have answered, and they computed after all was waited for."""
    model = write_family(tmp_path, family)
    bench = Bench(tmp_path, num_groups=2)
    events, ids = run(bench)
    layers = sum(name.endswith("shared_experts") for name, _ in bench.engine.model_runner.decoder.model.named_modules())
    assert layers > 1
    assert events == ROUND * layers * NEW_TOKENS
    assert ids == [generated(model, prompt(9), NEW_TOKENS)]
