"""`priority` and `service_tier`, at both doors."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from cluster.errors import Overloaded
from cluster.messages import ModelCard
from gateway.admission.recent_refusals import RecentRefusals
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server

USER = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
}


@pytest.fixture
def coordinator(tokenizer: HuggingFaceTokenizer) -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))


@pytest.mark.parametrize("route", BODIES)
def test_a_priority_reaches_the_coordinator_over_http(
    card: ModelCard, coordinator: ScriptedCoordinator, route: str
) -> None:
    body = BODIES[route] | {"model": "tiny"}
    with http_server(build_frontend(card, coordinator)) as url:
        for fields in ({}, {"priority": None}, {"priority": -3}, {"priority": 7.0}):
            assert httpx.post(url + route, json=body | fields).status_code == 200
        for wrong in (2**31, -(2**31) - 1, 0.5, "urgent", True):
            refused = httpx.post(url + route, json=body | {"priority": wrong})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert [request.priority for request in coordinator.requests] == [0, 0, -3, 7]


def test_a_priority_reaches_the_coordinator_over_grpc(card: ModelCard, coordinator: ScriptedCoordinator) -> None:
    with grpc_server(build_frontend(card, coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        stub.Chat(
            chat_pb2.ChatRequest(
                model="tiny",
                messages=[chat_pb2.Message(role="user", content="Hello")],
                sampling=chat_pb2.Sampling(priority=-3, n=2),
            )
        )
        list(stub.GenerateStream(chat_pb2.GenerateRequest(model="tiny", text="Hi")))
    assert [request.priority for request in coordinator.requests] == [-3, -3, 0]


def test_a_service_tier_is_ignored_and_answered_as_openai_does(
    card: ModelCard, coordinator: ScriptedCoordinator
) -> None:
    with http_server(build_frontend(card, coordinator)) as url:
        for route in ("/v1/chat/completions", "/v1/responses"):
            body = BODIES[route] | {"model": "tiny"}
            for tier in ("auto", "priority", "flex", "what they invent"):
                assert httpx.post(url + route, json=body | {"service_tier": tier}).json()["service_tier"] == "default"
            for said in ({}, {"service_tier": None}):
                assert "service_tier" not in httpx.post(url + route, json=body | said).json()
        stream = httpx.post(
            url + "/v1/chat/completions",
            json={"model": "tiny", "messages": USER, "stream": True, "service_tier": "auto"},
        )
    chunks = [line for line in stream.text.splitlines() if line.startswith("data: {")]
    assert chunks
    assert all('"service_tier":"default"' in chunk for chunk in chunks)


def test_a_refusal_of_one_holds_up_no_more_urgent_one() -> None:
    refusals = RecentRefusals(lambda: 0.0)
    refusals.note("m", "alice", Overloaded("full", reason="shed_queue"), 5)
    for priority in (5, 6):
        with pytest.raises(Overloaded) as refused:
            refusals.check("m", "alice", priority)
        assert refused.value.reason == "shed_queue"
    refusals.check("m", "alice", 4)
