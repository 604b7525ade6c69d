"""A prompt costs its key nothing when it is refused: a full server had billed every try.

Time stands still here, so that a key's standing is exact.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig
from cluster.errors import ExpertUnavailable, InvalidRequest, MantaError, ModelLoading, Overloaded
from cluster.messages import Embedding, Request, TokenChunk
from gateway.admission.api_keys import ApiKey, digest
from gateway.admission.limits import Limiter
from gateway.coordinators.health import Health
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.http.errors import status_of
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, failing_script, http_server, model_card, ready, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.raw_http import asking
from tests.waiting import wait_for

LIMIT = 1000
PROMPT = [40] * 30
METADATA = (("authorization", "Bearer a"),)
REFUSALS: list[MantaError] = [
    Overloaded("the queue is full"),
    ModelLoading("loading"),
    ExpertUnavailable("expert-0 is gone"),
    InvalidRequest("the schema does not compile", param="response_format"),
]


class Coordinator(ScriptedCoordinator):
    """Embeds, unless `error` is set."""

    error: Exception | None = None

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        if self.error is not None:
            raise self.error
        return tuple(Embedding(r.request_id, r.choice_index, b"\0\0\x80\x3f" * 8) for r in requests)


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator(tokens_script([40], eos=None))


@pytest.fixture
def frontend(tokenizer_directory: Path, coordinator: Coordinator, tmp_path: Path) -> Frontend:
    (tmp_path / "keys.json").write_text(
        json.dumps([{"id": "alice", "sha256": digest("a"), "tokens_per_minute": LIMIT}])
    )
    embedding: dict[str, Any] = {"name": "embed", "aliases": (), "application": "e", "hidden_size": 8}
    cards = model_card(tokenizer_directory), model_card(tokenizer_directory, kind="embedding", **embedding)
    frontend = Frontend(
        GatewayConfig(api_keys_file=tmp_path / "keys.json"),
        cards,
        dict.fromkeys([card.application for card in cards], HuggingFaceTokenizer(tokenizer_directory)),
        dict.fromkeys([card.application for card in cards], coordinator),
        Health(cards, ready),
    )
    frontend.limiter = Limiter(CollectorRegistry(), lambda: 1000.0)
    return frontend


@pytest.fixture
def url(frontend: Frontend) -> Iterator[str]:
    with http_server(frontend) as url:
        yield url


@pytest.fixture
def spent(frontend: Frontend) -> Callable[[], tuple[int, int]]:
    """Tokens taken of the key's minute, and prompt tokens in its figures."""

    def spent() -> tuple[int, int]:
        limits = frontend.limiter.of(ApiKey(id="alice", sha256=digest("a"), tokens_per_minute=LIMIT))
        remaining = int(limits.headers()["x-ratelimit-remaining-tokens"])
        return LIMIT - remaining, int(frontend.limiter.tokens.labels("alice", "prompt")._value.get())

    return spent


def post(url: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "max_tokens": 1} | fields
    return httpx.post(url + path, json=body, headers={"authorization": "Bearer a"}, timeout=30)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"prompt": [PROMPT, PROMPT]}], ids=str)
def test_a_refusal_costs_nothing(
    url: str, coordinator: Coordinator, spent: Any, error: MantaError, fields: dict[str, Any]
) -> None:
    coordinator._script = failing_script([], error)
    answer = post(url, **{"prompt": PROMPT} | fields)
    assert answer.status_code == status_of(error)[0]
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(LIMIT), "the client is told so"
    assert spent() == (0, 0)


def test_what_is_answered_is_paid(url: str, spent: Any) -> None:
    assert post(url, prompt=PROMPT).status_code == 200
    assert spent() == (30 + 1, 30)
    assert post(url, prompt=PROMPT, n=3).status_code == 200
    assert spent() == (31 + 30 + 3, 60), "choices share their prompt"
    assert post(url, prompt=[PROMPT, PROMPT], stream=True).status_code == 200
    assert spent() == (64 + 60 + 2, 120)


def test_of_several_prompts_those_that_were_begun_are_paid(url: str, coordinator: Coordinator, spent: Any) -> None:
    """The second is refused after the first has got its tokens; nobody has begun with the third."""

    has_begun = asyncio.Event()

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        if request.request_id.endswith("-0"):
            yield TokenChunk(request.request_id, 0, 0, (40,))
            has_begun.set()
            await asyncio.sleep(30)
        await has_begun.wait()
        raise Overloaded("the queue is full")

    coordinator._script = script
    answer = post(url, prompt=[[40] * 10, [40] * 20, [40] * 40], stream=True, max_tokens=9)
    assert "the queue is full" in answer.text
    wait_for(lambda: spent() == (10 + 1, 10), 10, "the first to be paid")


def test_a_full_gateway_and_a_wrong_field_cost_nothing(url: str, frontend: Frontend, spent: Any) -> None:
    assert post(url, prompt=PROMPT, max_tokens=300).status_code == 400
    frontend._ongoing["alice"] = frontend._ongoing["bob"] = 200  # full since it was admitted
    with pytest.MonkeyPatch.context() as patch:
        refuse, calls = frontend._refuse_when_full, []
        patch.setattr(frontend, "_refuse_when_full", lambda: calls.append(1) or (len(calls) > 1 and refuse()))
        assert post(url, prompt=PROMPT).status_code == 429
    assert len(calls) == 2
    assert spent() == (0, 0)


@pytest.mark.parametrize("error", REFUSALS[:3], ids=lambda error: type(error).__name__)
def test_embeddings(url: str, coordinator: Coordinator, spent: Any, error: MantaError) -> None:
    coordinator.error = error
    assert post(url, "/v1/embeddings", model="embed", input=[PROMPT, PROMPT]).status_code == status_of(error)[0]
    assert spent() == (0, 0)
    coordinator.error = None
    time.sleep(0.11)  # a refusal holds for a moment
    assert post(url, "/v1/embeddings", model="embed", input=[PROMPT, PROMPT]).status_code == 200
    assert spent() == (60, 60)


def test_of_embeddings_in_parts_those_that_were_asked_for_are_paid(
    url: str, coordinator: Coordinator, spent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part fails, or its client leaves: the first was computed, and nobody has begun with the third."""
    monkeypatch.setattr("gateway.frontend.EMBEDDINGS_PER_CALL", 2)
    embed, asked = coordinator.embed, []

    async def with_trouble(requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        asked.append(requests)
        if len(asked) == 2:
            raise ExpertUnavailable("expert-0 is gone")
        if len(asked) == 4:
            await asyncio.sleep(30)
        return await embed(requests)

    monkeypatch.setattr(coordinator, "embed", with_trouble)
    prompts = [[40] * 10] * 2 + [[40] * 20] * 2 + [[40] * 40] * 2
    assert post(url, "/v1/embeddings", model="embed", input=prompts).status_code == 503
    assert spent() == (20, 20), "it was free, and so was every other try"
    with asking(url, "/v1/embeddings", {"model": "embed", "input": prompts}, "a"):
        wait_for(lambda: len(asked) == 4, 60, "the second part to be asked for")
    wait_for(lambda: spent() == (20 + 60, 20 + 60), 10, "the first two to be paid")


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_over_grpc(frontend: Frontend, coordinator: Coordinator, spent: Any, error: MantaError) -> None:
    request = chat_pb2.GenerateRequest(
        model="tiny", token_ids=chat_pb2.TokenIds(ids=PROMPT), sampling=chat_pb2.Sampling(max_tokens=1)
    )
    embed = chat_pb2.EmbedRequest(
        model="embed", inputs=[chat_pb2.EmbedInput(token_ids=chat_pb2.TokenIds(ids=PROMPT))] * 2
    )
    script, coordinator._script, coordinator.error = coordinator._script, failing_script([], error), error
    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        for call in (
            lambda: stub.Generate(request, metadata=METADATA),
            lambda: list(stub.GenerateStream(request, metadata=METADATA)),
            lambda: stub.Embed(embed, metadata=METADATA),
        ):
            with pytest.raises(grpc.RpcError):
                call()
            assert spent() == (0, 0)
            time.sleep(0.11)  # a refusal holds for a moment
        coordinator._script, coordinator.error = script, None
        stub.Generate(request, metadata=METADATA)
        stub.Embed(embed, metadata=METADATA)
        assert spent() == (30 + 1 + 60, 90)


def test_a_client_that_does_not_wait_pays(url: str, coordinator: Coordinator, spent: Any) -> None:
    """Its prompt may have been computed by then; else prompts were free for whoever hangs up in time."""
    coordinator._script = tokens_script([40], pause_s=30)
    with asking(url, "/v1/completions", {"model": "tiny", "prompt": PROMPT}, "a"):
        wait_for(lambda: coordinator.running == 1, 60, "its sequence")
    wait_for(lambda: spent() == (30, 30), 10, "its prompt to be paid")
