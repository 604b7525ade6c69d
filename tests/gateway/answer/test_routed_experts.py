"""`return_routed_experts` at both doors: by token, layer and choice, whole and streamed, and only when asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import numpy as np
import pytest

from cluster.messages import ModelCard, Request, TokenChunk
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.http.test_http import sse

NUM_TOKENS = 13
EXPECTED = [[[i, i + 1], [i + 2, i + 3]] for i in range(NUM_TOKENS)]


@pytest.fixture
def frontend(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> Frontend:
    """Token i went to experts i and i + 1 in layer 0, to i + 2 and i + 3 in layer 1; two tokens a chunk."""
    ids = tokenizer.encode("Hello STOP é, and so on")[1 : NUM_TOKENS + 1]
    assert len(ids) == NUM_TOKENS

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        for at in range(0, len(ids), 2):
            piece = ids[at : at + 2]
            experts = np.array([at + i + j for i in range(len(piece)) for j in range(4)], np.uint16).tobytes()
            yield TokenChunk(
                request.request_id,
                request.choice_index,
                at,
                piece,
                finish_reason="length" if at + 2 >= len(ids) else None,
                routed_experts=experts if request.sampling.routed_experts else None,
            )

    return build_frontend(replace(card, num_layers=2, num_experts=8, top_k=2), ScriptedCoordinator(script))


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_token_has_its_experts(frontend: Frontend, path: str) -> None:
    body = {"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    with http_server(frontend) as url:
        url += f"/v1/{path}"
        asking = body | {"return_routed_experts": True}
        assert httpx.post(url, json=asking).json()["choices"][0]["routed_experts"] == EXPECTED
        chunks = sse(httpx.post(url, json=asking | {"stream": True}).text)
        assert [token for chunk in chunks for token in chunk["choices"][0].get("routed_experts", [])] == EXPECTED
        cut = httpx.post(url, json=asking | {"stop": "STOP"}).json()["choices"][0]
        assert 0 < len(cut["routed_experts"]) < NUM_TOKENS
        assert cut["routed_experts"] == EXPECTED[: len(cut["routed_experts"])]
        for stream in (False, True):
            assert "routed_experts" not in httpx.post(url, json=body | {"stream": stream}).text


def test_experts_that_would_fill_a_gateway_are_streamed_or_refused(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities were bounded: 128 choices of 4,096 tokens had 1.4 GB of Mixtral's experts."""
    monkeypatch.setattr("gateway.answer.held_scores.MAX_SCORES", 2 * NUM_TOKENS)
    asking = {"model": "tiny", "prompt": "x", "return_routed_experts": True}
    with http_server(frontend) as url:
        url += "/v1/completions"
        assert httpx.post(url, json=asking).status_code == 200
        refused = httpx.post(url, json=asking | {"n": 2})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_routed_experts")
        assert "ask for a stream" in refused.json()["error"]["message"]
        assert len(sse(httpx.post(url, json=asking | {"n": 2, "stream": True}).text)) == 2 * 7


def test_every_token_has_its_experts_over_grpc(frontend: Frontend) -> None:
    def lists(choice: chat_pb2.Choice) -> list[list[list[int]]]:
        return [[list(layer.experts) for layer in token.layers] for token in choice.routed_experts]

    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        asking = chat_pb2.GenerateRequest(
            model="tiny", text="x", sampling=chat_pb2.Sampling(return_routed_experts=True)
        )
        assert lists(stub.Generate(asking).choices[0]) == EXPECTED
        assert [token for chunk in stub.GenerateStream(asking) for token in lists(chunk.choice)] == EXPECTED
        assert lists(stub.Generate(chat_pb2.GenerateRequest(model="tiny", text="x")).choices[0]) == []


def test_experts_from_256_on_are_told(card: ModelCard) -> None:
    """Expert 300 was told as expert 44, later the request refused; and the chat page, which asks, answered nothing."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        experts = np.array([300, 44], np.uint16).tobytes()
        yield TokenChunk(request.request_id, 0, 0, (40,), finish_reason="length", routed_experts=experts)

    frontend = build_frontend(replace(card, num_experts=384, top_k=2), ScriptedCoordinator(script))
    with http_server(frontend) as url:
        answer = httpx.post(
            f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "return_routed_experts": True}
        )
    assert answer.json()["choices"][0]["routed_experts"] == [[[300, 44]]]
