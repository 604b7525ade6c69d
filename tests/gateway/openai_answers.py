"""Holds every answer of an HTTP door to OpenAI's published schema of it, whatever client asked. Knows paths and bodies.

`openai_answers.json` says where the schemas come from. Fields of our own are allowed, as the schemas allow them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.authentication import PUBLIC_PATHS

Json = dict[str, Any]
SCHEMAS: Json = json.loads((Path(__file__).parent / "openai_answers.json").read_text())
WHOLE = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/v1/embeddings": "CreateEmbeddingResponse",
    "/v1/responses": "Response",
}
MAX_BYTES = 65_536  # of an answer or event that is looked at: larger ones have more of the same


class CheckedAnswers:
    """An application whose answers are kept, and looked at once nobody is kept waiting."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: list[tuple[str, int, str, list[bytes]]] = []  # path, status, content type, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_anthropics(scope):
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []

        async def kept(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] in ("GET", "POST"):  # others have no body
                headers = {name.lower(): value.decode("latin-1") for name, value in message["headers"]}
                self._answers.append((scope["path"], message["status"], headers.get(b"content-type", ""), parts))
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, kept)

    def check(self) -> None:
        """Raises AssertionError for the first answer that is none of OpenAI's."""
        seen: set[tuple[str, bytes]] = set()
        for path, status, content_type, parts in self._answers:
            for kind, data in _documents(path, status, content_type, b"".join(parts)):
                if len(data) <= MAX_BYTES and (kind, data) not in seen:
                    seen.add((kind, data))
                    errors = problems(kind, json.loads(data))
                    assert not errors, f"{path}: {errors} in {data!r}"


def problems(kind: str, document: Json) -> str:
    """What makes a document no `kind`, a name of the schemas; empty if nothing does."""
    if kind == "ResponseStreamEvent":
        kind = _EVENTS.get(document.get("type", ""), kind)
    error = jsonschema.exceptions.best_match(_VALIDATORS[kind].iter_errors(document))
    return "" if error is None else f"{kind} {error.json_path}: {error.message}"


def error_keys(path: str) -> set[str]:
    """Of the object that an error of this route is."""
    return {"type", "message"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}


def _is_anthropics(scope: Scope) -> bool:
    """Whether the answer has Anthropic's shape, which the tests of its API check."""
    return scope["path"].startswith("/v1/messages") or any(
        name == b"anthropic-version" for name, _ in scope.get("headers", ())
    )


def _documents(path: str, status: int, content_type: str, body: bytes) -> Iterator[tuple[str, bytes]]:
    if status != 200:
        if content_type == "application/json" and path not in PUBLIC_PATHS:
            yield "Error", body
    elif content_type.startswith("text/event-stream"):
        for event in body.split(b"\n\n")[:-1]:  # what follows the last is nothing, or was cut
            data = event.rpartition(b"data: ")[2]
            if not event.startswith(b":") and data != b"[DONE]":
                yield _kind_of_event(path, data), data
    elif path in WHOLE:
        yield WHOLE[path], body
    elif path == "/v1/models":
        yield "Models", body
    elif path.startswith("/v1/models/"):
        yield "Model", body


def _kind_of_event(path: str, data: bytes) -> str:
    if data.startswith(b'{"error":'):
        return "Error"
    return {"/v1/chat/completions": "ChatCompletionChunk", "/v1/completions": "CompletionChunk"}.get(
        path, "ResponseStreamEvent"
    )


def _definitions() -> Json:
    """The published ones, and what OpenAI's own server answers although they do not say it."""
    own: Json = SCHEMAS["definitions"]
    choice = own["CompletionChoice"]
    unfinished = {**choice["properties"]["finish_reason"], "type": ["string", "null"]}
    unfinished["enum"] = [*unfinished["enum"], None]
    base64 = {**own["Embedding"]["properties"], "embedding": {"type": ["array", "string"], "items": {"type": "number"}}}
    echoed = {name: _first_may_be_null(of) for name, of in own["CompletionChoice.Logprobs"]["properties"].items()}
    return {
        **own,
        "Error": {"type": "object", "properties": {"error": _ref("ErrorObject")}, "required": ["error"]},
        "Models": {
            "type": "object",
            "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}},
            "required": ["object", "data"],
        },
        "CompletionChunk": {
            **own["Completion"],
            "properties": {
                **own["Completion"]["properties"],
                "choices": {"type": "array", "items": _ref("UnfinishedChoice")},
            },
        },
        "UnfinishedChoice": {**choice, "properties": {**choice["properties"], "finish_reason": unfinished}},
        "Embedding": {**own["Embedding"], "properties": base64},
        "CompletionChoice.Logprobs": {**own["CompletionChoice.Logprobs"], "properties": echoed},
    }


def _first_may_be_null(array: Json) -> Json:
    """A prompt that is echoed begins with a token that nothing came before."""
    return {
        "type": "array",
        "items": [{"anyOf": [array["items"], {"type": "null"}]}],
        "additionalItems": array["items"],
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/definitions/{name}"}


_DEFINITIONS = _definitions()
_VALIDATORS = {name: jsonschema.Draft7Validator({**_ref(name), "definitions": _DEFINITIONS}) for name in _DEFINITIONS}
_EVENTS = {
    definition["properties"]["type"]["const"]: name
    for name, definition in _DEFINITIONS.items()
    if name.endswith("Event") and "properties" in definition
}
