"""What looks at every answer of these tests sees what is wrong with one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from tests.gateway.openai_answers import CheckedAnswers, problems

MESSAGE = {"role": "assistant", "content": "Hi!", "refusal": None}
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "message": MESSAGE, "logprobs": None, "finish_reason": "stop", "token_ids": [5]}],
}


def test_every_required_field_is_missed() -> None:
    assert not problems("ChatCompletion", CHAT)  # token_ids is our own addition
    assert "'model' is a required property" in problems("ChatCompletion", {k: CHAT[k] for k in CHAT if k != "model"})
    for name in MESSAGE:
        message = {key: value for key, value in MESSAGE.items() if key != name}
        choice = CHAT["choices"][0] | {"message": message}
        assert name in problems("ChatCompletion", CHAT | {"choices": [choice]})
    assert "no_such" in problems(
        "ChatCompletion", CHAT | {"choices": [CHAT["choices"][0] | {"finish_reason": "no_such"}]}
    )


@pytest.mark.parametrize(
    ("path", "status", "content_type", "body"),
    [
        ("/v1/chat/completions", 200, "application/json", json.dumps(CHAT | {"object": "chat"})),
        ("/v1/chat/completions", 200, "text/event-stream", f"data: {json.dumps(CHAT)}\n\ndata: [DONE]\n\n"),
        ("/v1/completions", 200, "text/event-stream", 'data: {"id": "x"}\n\n: a comment\n\n'),
        ("/v1/responses", 200, "text/event-stream", 'event: x\ndata: {"type": "response.created"}\n\n'),
        ("/v1/responses", 200, "text/event-stream", 'data: {"type": "response.unheard_of"}\n\n'),
        ("/v1/embeddings", 200, "application/json", '{"object": "list", "data": []}'),
        ("/v1/models", 200, "application/json", '{"object": "list", "data": [{"id": "tiny"}]}'),
        ("/v1/models/tiny", 200, "application/json", '{"id": "tiny"}'),
        ("/tokenize", 400, "application/json", '{"detail": "no"}'),
        ("/v1/chat/completions", 200, "text/event-stream", 'data: {"error": {"message": "no"}}\n\n'),
    ],
)
def test_an_answer_of_another_shape_is_found(path: str, status: int, content_type: str, body: str) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        pass

    checked = CheckedAnswers(app)
    asyncio.run(checked({"type": "http", "method": "POST", "path": path}, receive, send))
    with pytest.raises(AssertionError, match=path):
        checked.check()
