"""Headers that clients set: the request id, Serve's commands, and what is no text; and CORS."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig
from gateway.edge.client_headers import IMPORT_PATH, ClientHeaders, middlewares
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script

Headers = list[tuple[bytes, bytes]]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def exchange(headers: Headers) -> tuple[Headers, Headers]:
    """What an application sees of these headers, and what the client gets of its answer, which has an id of its own."""
    seen: list[Headers] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"serve's")]})

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ClientHeaders(app)({"type": "http", "headers": headers}, receive, send))
    return seen[0], sent[0]["headers"]


@pytest.mark.parametrize("safe", [b"a", b"req-1.2:3_4", b"x" * 128])
def test_a_safe_request_id_is_echoed(safe: bytes) -> None:
    assert exchange([(b"X-Request-Id", safe)]) == ([(b"x-request-id", safe)], [(b"x-request-id", safe)])


@pytest.mark.parametrize(
    "unsafe", [[], [b""], [b"x" * 129], [b"a b"], [b"a\xff"], [b"<script>"], [b"a\n"], [b"a", b"b"]]
)
def test_any_other_is_replaced_by_one_of_ours(unsafe: list[bytes]) -> None:
    seen, answered = exchange([(b"x-request-id", value) for value in unsafe])
    assert seen == answered
    [(_, request_id)] = seen
    assert request_id not in unsafe
    assert len(request_id) == 32


def test_serves_commands_and_what_is_no_text_do_not_pass() -> None:
    seen, _ = exchange(
        [
            (b"x-request-id", b"a"),
            (b"X-Request-Timeout-Seconds", b"0"),
            (b"x-request-disconnect-disabled", b"?1"),
            (b"serve_multiplexed_model_id", b"x"),
            (b"serve-multiplexed-model-id", b"x"),
            (b"x-\xff", b"1"),
            (b"x-name", b"\xff"),
            (b"authorization", b"Bearer k"),
        ]
    )
    assert seen == [(b"authorization", b"Bearer k"), (b"x-request-id", b"a")]


def test_serve_is_told_where_they_are() -> None:
    module, _, name = IMPORT_PATH.partition(":")
    assert (module, name) == (middlewares.__module__, middlewares.__name__)


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    config = GatewayConfig(cors_origins=("https://app.example",))
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([40, 41])), config)) as url:
        yield url


def test_pages_of_a_listed_origin_may_call(url: str) -> None:
    origin = {"origin": "https://app.example"}
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = httpx.options(url + "/v1/chat/completions", headers=origin | preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    for body, status in ((CHAT, 200), (CHAT | {"n": 0}, 400)):
        answer = httpx.post(url + "/v1/chat/completions", json=body, headers=origin)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    stranger = {"origin": "https://other.example"}
    assert httpx.options(url + "/v1/chat/completions", headers=stranger | preflight).status_code == 400
    answer = httpx.post(url + "/v1/chat/completions", json=CHAT, headers=stranger)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_no_origin_may_by_default(card: Any) -> None:
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([40])))) as url:
        answer = httpx.post(url + "/v1/chat/completions", json=CHAT, headers={"origin": "https://app.example"})
        assert answer.status_code == 400
        assert not any(name.startswith("access-control") for name in answer.headers)
