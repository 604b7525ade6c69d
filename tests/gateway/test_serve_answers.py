"""Answers that Serve makes itself, as Serve makes them, reach clients in the shape of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages

from gateway.client_headers import middlewares
from gateway.serve_answers import ServeAnswers

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

    asyncio.run(ServeAnswers(serve)({"type": "http", "path": path}, receive, send))
    return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("status", "text", "kind", "code"),
    [
        (429, BACKPRESSURE, "rate_limit_error", "overloaded"),
        (408, "Request 1 timed out after 605.0s.", "timeout_error", "deadline_exceeded"),
        (404, "Path '/v1' not found.", "not_found_error", None),
        (500, "Traceback (most recent call last): …", "internal_error", None),
    ],
)
def test_a_plain_text_becomes_an_error_of_ours(status: int, text: str, kind: str, code: str | None) -> None:
    head, content = answered(convert_object_to_asgi_messages(text, status, [(b"retry-after", b"1")]))
    headers = dict(head["headers"])
    assert head["status"] == status
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"retry-after"] == b"1"
    assert int(headers[b"content-length"]) == len(content)
    error = json.loads(content)["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, None)
    assert (error["message"] == text) == (status < 500), "what went wrong inside is nobody's business"


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
