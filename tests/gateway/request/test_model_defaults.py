"""What a model's authors chose holds at every door for requests that do not say; what a request says goes before it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.messages import SamplingDefaults
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, model_card, tokens_script
from tests.gateway.grpc.test_grpc import USER, grpc_server

CHOSEN = SamplingDefaults(temperature=0.7, top_p=0.9, top_k=20, min_p=0.25, repetition_penalty=1.125)
OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
}


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40]))


@pytest.fixture(scope="module")
def frontend(tokenizer_directory: Path, coordinator: ScriptedCoordinator) -> Any:
    return build_frontend(model_card(tokenizer_directory, defaults=CHOSEN), coordinator)


def sampled(coordinator: ScriptedCoordinator) -> dict[str, Any]:
    sampling = coordinator.requests[-1].sampling
    return {name: getattr(sampling, name) for name in OFF}


@pytest.mark.parametrize("route", BODIES)
def test_over_http(url: str, coordinator: ScriptedCoordinator, route: str) -> None:
    body = {"model": "tiny", **BODIES[route]}
    assert httpx.post(url + route, json=body, timeout=30).status_code == 200
    assert sampled(coordinator) == asdict(CHOSEN)
    # Responses has the first two only.
    said = {key: OFF[key] for key in OFF if route != "/v1/responses" or key in ("temperature", "top_p")}
    assert httpx.post(url + route, json=body | said, timeout=30).status_code == 200
    assert sampled(coordinator) == asdict(CHOSEN) | said


def test_over_grpc(tokenizer_directory: Path, coordinator: ScriptedCoordinator) -> None:
    with grpc_server(build_frontend(model_card(tokenizer_directory, defaults=CHOSEN), coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        for sampling, expected in ((None, asdict(CHOSEN)), (chat_pb2.Sampling(**OFF), OFF)):
            stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=USER, sampling=sampling))
            assert sampled(coordinator) == expected
            stub.Generate(chat_pb2.GenerateRequest(model="tiny", text="Hi", sampling=sampling))
            assert sampled(coordinator) == expected
