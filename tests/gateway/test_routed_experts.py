"""`return_routed_experts` over HTTP: lists by token, layer and choice, whole and streamed, and only when asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from cluster.messages import ModelCard, Request, TokenChunk
from gateway.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server
from tests.gateway.test_http import sse


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_token_has_its_experts(card: ModelCard, tokenizer: HuggingFaceTokenizer, path: str) -> None:
    ids = tokenizer.encode("Hello STOP é")[1:]

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        """Token i went to experts i and i + 1 in layer 0, to i + 2 and i + 3 in layer 1; two tokens a chunk."""
        for at in range(0, len(ids), 2):
            piece = ids[at : at + 2]
            experts = bytes(at + i + j for i in range(len(piece)) for j in range(4))
            yield TokenChunk(
                request.request_id,
                request.choice_index,
                at,
                piece,
                finish_reason="length" if at + 2 >= len(ids) else None,
                routed_experts=experts if request.sampling.routed_experts else None,
            )

    card = replace(card, num_layers=2, num_experts=8, top_k=2)
    expected = [[[i, i + 1], [i + 2, i + 3]] for i in range(len(ids))]
    body = {"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    with http_server(build_frontend(card, ScriptedCoordinator(script))) as url:
        url += f"/v1/{path}"
        asking = body | {"return_routed_experts": True}
        assert httpx.post(url, json=asking).json()["choices"][0]["routed_experts"] == expected
        chunks = sse(httpx.post(url, json=asking | {"stream": True}).text)
        assert [token for chunk in chunks for token in chunk["choices"][0].get("routed_experts", [])] == expected
        cut = httpx.post(url, json=asking | {"stop": "STOP"}).json()["choices"][0]
        assert 0 < len(cut["routed_experts"]) < len(expected)
        assert cut["routed_experts"] == expected[: len(cut["routed_experts"])]
        for stream in (False, True):
            assert "routed_experts" not in httpx.post(url, json=body | {"stream": stream}).text
