"""Answers that Serve makes itself, as Serve makes them, reach clients in the shape of ours."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages, start_asgi_http_server
from ray.serve.config import HTTPOptions

from cluster.messages import ModelCard
from gateway.edge.client_headers import middlewares
from gateway.edge.serve_answers import ServeAnswers, answer_malformed_requests
from gateway.http.app import build_app
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, tokens_script
from tests.ports import free_port
from tests.raw_http import MALFORMED, WEBSOCKET, check_error, exchange
from tests.waiting import wait_for

BACKPRESSURE = "Request dropped due to backpressure"


def answered(messages: list[Any], path: str = "/v1/models") -> tuple[Any, bytes]:
    """The head and the body that a client gets where Serve sends these messages."""
    sent: list[Any] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "path": path, "headers": [(b"x-request-id", b"mine")]}
    asyncio.run(ServeAnswers(serve)(scope, receive, send))
    return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("status", "text", "kind", "code", "reason"),
    [
        (429, BACKPRESSURE, "rate_limit_error", "overloaded", "shed_gateway"),
        (408, "Request 1 timed out after 605.0s.", "timeout_error", "deadline_exceeded", "deadline"),
        (500, "Traceback (most recent call last): …", "internal_error", None, "internal"),
    ],
)
def test_a_plain_text_becomes_an_error_of_ours(
    status: int, text: str, kind: str, code: str | None, reason: str
) -> None:
    head, content = answered(convert_object_to_asgi_messages(text, status, [(b"retry-after", b"1")]))
    headers = dict(head["headers"])
    assert head["status"] == status
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"retry-after"] == b"1"
    assert headers[b"x-manta-reason"] == reason.encode()
    assert int(headers[b"content-length"]) == len(content)
    error = json.loads(content)["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, None)
    assert (error["message"] == text) == (status < 500), "what went wrong inside is nobody's business"


def test_where_there_is_no_gateway_it_is_worth_another_try() -> None:
    """While a server starts or ends, Serve's proxy said 404, after which no client tries again."""
    head, content = answered(convert_object_to_asgi_messages("Path '/v1' not found. Ping http://.../-/routes", 404))
    headers = dict(head["headers"])
    assert (head["status"], headers[b"retry-after"], headers[b"x-manta-reason"]) == (503, b"1", b"unavailable")
    assert json.loads(content)["error"] == {
        "message": "no gateway can be reached now; try again",
        "type": "service_unavailable",
        "param": None,
        "code": "unavailable",
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "rate_limit_error"), (404, "overloaded_error"), (500, "api_error"), (503, "overloaded_error")],
)
def test_where_anthropic_s_clients_ask_it_is_an_error_of_anthropic_s(status: int, kind: str) -> None:
    """Those of OpenAI came on /v1/messages, whenever it was Serve that answered."""
    head, content = answered(convert_object_to_asgi_messages(BACKPRESSURE, status), "/v1/messages")
    error = json.loads(content)
    assert (error["type"], error["error"]["type"], error["request_id"]) == ("error", kind, "mine")
    assert dict(head["headers"])[b"request-id"] == b"mine"
    assert int(dict(head["headers"])[b"content-length"]) == len(content)


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        (convert_object_to_asgi_messages("draining", 503), "/-/healthz"),
        (convert_object_to_asgi_messages("# HELP", 200), "/metrics"),
        (convert_object_to_asgi_messages({"error": {}}, 400), "/v1/models"),
    ],
)
def test_all_else_stays_as_it_is(messages: list[Any], path: str) -> None:
    assert answered(messages, path) == (messages[0], messages[1]["body"])


def test_serve_is_told_of_it() -> None:
    assert ServeAnswers in [middleware.cls for middleware in middlewares()]


@contextmanager
def serves_http_server(app: Any) -> Iterator[int]:
    """uvicorn as Serve starts it in its proxies and in our replicas; its port."""
    port = free_port()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    options = HTTPOptions(host="127.0.0.1", port=port)
    starting = start_asgi_http_server(app, options, event_loop=loop)
    task, server = asyncio.run_coroutine_threadsafe(starting, loop).result()
    wait_for(lambda: server.started, 30, "the server")
    try:
        yield port
    finally:
        server.should_exit = True
        wait_for(task.done, 30, "its end")
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_what_is_no_http_has_an_error_like_any_other(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """uvicorn answered in plain text, before any code of Serve's or ours, and to an upgrade without a body."""
    answer_malformed_requests()
    frontend = build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("x"))))
    with serves_http_server(ServeAnswers(build_app(frontend))) as port:
        answers = {what: exchange(port, request) for what, (request, _, _) in MALFORMED.items()}
        upgrade = exchange(port, WEBSOCKET)
    assert {what: answer[0] for what, answer in answers.items()} == {what: MALFORMED[what][2] for what in MALFORMED}
    assert upgrade[0] == 403
    for answer in (*answers.values(), upgrade):
        if answer[0] != 200:
            check_error(*answer)


def test_no_answer_at_all_is_an_error_like_any_other() -> None:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        """As Serve does when our code raises."""

    with serves_http_server(ServeAnswers(serve)) as port:
        answer = exchange(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert answer[0] == 500
    check_error(*answer)
