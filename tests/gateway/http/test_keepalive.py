"""A stream says something before its first token and in its pauses: proxies with an idle limit cut long prefills."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest
from mistralai.client import Mistral
from starlette.requests import Request as HttpRequest

from cluster.config import GatewayConfig
from cluster.errors import InvalidRequest, MantaError, Overloaded, Unavailable
from cluster.messages import ModelCard, Request, TokenChunk
from gateway.http import sse
from gateway.http.sse import COMMENT, EventStream, begun
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server
from tests.waiting import wait_for

FIRST_EVENT_S = 0.3  # here
KEEPALIVE_S = 0.1
ANSWER = "Hello, my name is Manta."
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "stream": True},
    "/v1/completions": {"model": "tiny", "prompt": "Hello", "stream": True},
    "/v1/responses": {"model": "tiny", "input": "Hello", "stream": True},
    "/v1/messages": {"model": "tiny", "max_tokens": 99, "messages": MESSAGES, "stream": True},
}


class SlowCoordinator(ScriptedCoordinator):
    """Takes `prefill_s` to the first token, or to `error`, and `pause_s` after it, and waits for the test with each."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__(self._answer)
        self.tokens = tokens
        self.prefill_s, self.pause_s = FIRST_EVENT_S + 2 * KEEPALIVE_S, 0.0
        self.may_begin, self.may_go_on = threading.Event(), threading.Event()
        for event in (self.may_begin, self.may_go_on):
            event.set()
        self.error: MantaError | None = None

    async def _answer(self, request: Request) -> AsyncIterator[TokenChunk]:
        await asyncio.sleep(self.prefill_s)
        await asyncio.to_thread(self.may_begin.wait, 60)
        if self.error is not None:
            raise self.error
        yield TokenChunk(request.request_id, 0, 0, self.tokens[:1])
        await asyncio.sleep(self.pause_s)
        await asyncio.to_thread(self.may_go_on.wait, 60)
        yield TokenChunk(request.request_id, 0, 1, self.tokens[1:], finish_reason="stop")


@pytest.fixture
def coordinator(tokenizer: HuggingFaceTokenizer) -> SlowCoordinator:
    return SlowCoordinator(tokenizer.encode(ANSWER)[1:])


@pytest.fixture
def url(card: ModelCard, coordinator: SlowCoordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sse, "FIRST_EVENT_S", FIRST_EVENT_S)
    with http_server(build_frontend(card, coordinator, GatewayConfig(keepalive_s=KEEPALIVE_S))) as url:
        yield url


def received(url: str, path: str, look: Callable[[bytes], object] = bool) -> bytes:
    """What a client reads from its socket until the answer is complete. It looks at what it has after each piece."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps(BODIES[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    found = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        while data := connection.recv(65536):
            found += data
            look(found)
    return found


@pytest.mark.parametrize("path", sorted(BODIES))
def test_headers_and_comments_come_before_the_first_token(url: str, coordinator: SlowCoordinator, path: str) -> None:
    """The first token comes once they are there."""
    coordinator.may_begin.clear()

    def look(found: bytes) -> None:
        if found.count(COMMENT) >= 3:
            coordinator.may_begin.set()

    whole = received(url, path, look)
    assert coordinator.may_begin.is_set()
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
    assert whole.partition(b"data:")[0].count(COMMENT) >= 3
    assert whole.endswith(b"0\r\n\r\n"), "complete"
    assert b'"error":{' not in whole


def test_pauses_between_tokens_have_comments(url: str, coordinator: SlowCoordinator) -> None:
    """The second token comes once they are there; the first one is not kept back for it."""
    coordinator.prefill_s = 0.0
    coordinator.may_go_on.clear()

    def look(found: bytes) -> None:
        if found.partition(b"data:")[2].count(COMMENT) >= 3:
            coordinator.may_go_on.set()

    whole = received(url, "/v1/chat/completions", look)
    assert coordinator.may_go_on.is_set()
    assert whole.count(COMMENT) >= 3


def test_a_refusal_in_time_has_its_status(
    url: str, coordinator: SlowCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "FIRST_EVENT_S", 30.0)  # a busy machine is in time, too
    coordinator.prefill_s, coordinator.error = 0.05, Overloaded("the queue is full")
    assert received(url, "/v1/chat/completions").startswith(b"HTTP/1.1 429 ")


@pytest.mark.parametrize("path", sorted(BODIES))
def test_a_late_error_is_an_event(url: str, coordinator: SlowCoordinator, path: str) -> None:
    coordinator.error = Unavailable("an expert is gone")
    text = received(url, path).decode()
    assert text.startswith("HTTP/1.1 200 OK\r\n")
    [line] = [line for line in text.split("\n") if line.startswith("data:")]
    assert json.loads(line.removeprefix("data: "))["error"]["message"] == "an expert is gone"
    assert "[DONE]" not in text


def test_a_late_error_names_the_field_as_the_route_has_it(url: str, coordinator: SlowCoordinator) -> None:
    """A schema that takes long to be refused was called `response_format` by a route that has no such field."""
    coordinator.error = InvalidRequest(
        "response_format.json_schema.schema: too large", "response_format.json_schema.schema"
    )
    text = received(url, "/v1/responses").decode()
    [line] = [line for line in text.split("\n") if line.startswith("data:")]
    assert json.loads(line.removeprefix("data: "))["error"]["param"] == "text.format.schema"


def test_clients_overlook_comments(url: str, coordinator: SlowCoordinator) -> None:
    coordinator.pause_s = 0.3
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        events = list(client.responses.create(model="tiny", input="Hello", stream=True))
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == ANSWER
        coordinator.error = Unavailable("an expert is gone")
        with pytest.raises(openai.APIError, match="an expert is gone"):
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        coordinator.error = None
    with (
        Mistral(api_key="none", server_url=url) as client,
        client.chat.stream(model="tiny", messages=MESSAGES) as stream,
    ):
        assert "".join(str(event.data.choices[0].delta.content or "") for event in stream) == ANSWER


@pytest.mark.parametrize("path", sorted(BODIES))
def test_a_client_that_leaves_before_the_first_token_ends_its_sequence(
    url: str, coordinator: SlowCoordinator, path: str
) -> None:
    coordinator.prefill_s = 60.0
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps(BODIES[path])
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    for has_headers in (False, True):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall((head + body).encode())
            wait_for(lambda: coordinator.running == 1, 10, "the sequence")
            if has_headers:
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: coordinator.running == 0, 10, "the end of the sequence")


def test_a_client_that_leaves_before_the_headers_ends_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is closed before anybody has read of it left its sequence running until its first token."""
    monkeypatch.setattr(sse, "FIRST_EVENT_S", 0.01)

    async def run() -> None:
        has_ended = asyncio.Event()

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                await asyncio.sleep(60)
                yield b"data: x"
            finally:
                has_ended.set()

        async def receive() -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise OSError("the client has gone")

        scope = {"type": "http"}
        answer = EventStream(await begun(HttpRequest(scope, receive), events(), lambda _: b""), {}, 15.0)
        with pytest.raises(OSError, match="gone"):
            await answer(scope, receive, send)
        assert has_ended.is_set()

    asyncio.run(asyncio.wait_for(run(), 20))
