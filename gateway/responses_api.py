"""OpenAI's Responses API over a chat: its body, its answer and its events. Text, free or as JSON; nothing is stored.

Knows shapes; knows nothing of HTTP. One answer has one output item, a message with one part:

    response.created, response.in_progress, response.output_item.added, response.content_part.added,
    response.output_text.delta …, response.output_text.done, response.content_part.done, response.output_item.done,
    response.completed, or response.incomplete at max_output_tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.errors import InvalidRequest
from gateway.choice import Usage
from gateway.protocol import Body, ChatCompletionRequest, parse_body
from gateway.validator import Generation

Json = dict[str, Any]
TEXT_TYPES = ("input_text", "output_text", "text")

# Field → values that ask for nothing; as in `gateway.foreign_fields`, null always does.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


class TextOptions(Body):
    """How the text is constrained: `{"type": "json_schema", "name": …, "schema": {…}}`, or type json_object or text."""

    format: dict[str, Any] | None = None


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    model: str
    input: Any = None  # a string, or a list of messages; checked by `chat_of`
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None


def parse_responses_body(document: Json) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    """The typed body, and the chat that it asks for. Raises InvalidRequest; `renamed` gives it the client's field."""
    for name, harmless in _REFUSED.items():
        value = document.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            raise InvalidRequest(f"{name}: not supported by this server", param=name)
    body = parse_body(ResponsesRequest, {k: v for k, v in document.items() if k not in _REFUSED})
    chat = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": _response_format(body),
    }
    return body, parse_body(ChatCompletionRequest, chat)


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same about the field as the client wrote it."""
    for ours, theirs in _RENAMED.items():
        if error.param is not None and error.param.startswith(ours):
            param = theirs + error.param.removeprefix(ours)
            return type(error)(str(error).replace(error.param, param, 1), param=param)
    return error


class ResponsesShape:
    """The answer to one request, whole or as events."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        random = generation.id.rpartition("-")[2]
        sampling = generation.requests[0].sampling
        self._item_id = f"msg_{random}"
        self._text = ""
        self._number = 0
        self._response: Json = {
            "id": f"resp_{random}",
            "object": "response",
            "created_at": generation.created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": generation.card.name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def begin(self) -> Iterator[Json]:
        """The events before the first text."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress"))
        yield self._part_event("response.content_part.added", part=_part(""))

    def delta(self, text: str) -> Json:
        """More text."""
        self._text += text
        return self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def end(self, finish_reason: str | None, usage: Usage) -> Iterator[Json]:
        """The events after the last text."""
        whole = self.whole(self._text, finish_reason, usage)
        yield self._part_event("response.output_text.done", text=self._text, logprobs=[])
        yield self._part_event("response.content_part.done", part=_part(self._text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def error(self, body: Json) -> Json:
        """The event that ends a stream in the middle; `body` is the error as other routes answer it."""
        return self._event("error", **body, **{key: body["error"][key] for key in ("code", "message", "param")})

    def whole(self, text: str, finish_reason: str | None, usage: Usage) -> Json:
        """The body of a complete answer."""
        status = "completed" if finish_reason == "stop" else "incomplete"
        return self._response | {
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": [self._item(status, text)],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _item(self, status: str, text: str | None = None) -> Json:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part_event(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response_format(body: ResponsesRequest) -> Json | None:
    """As a chat has it: what describes a schema is one level deeper there."""
    given = body.text.format if body.text else None
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _messages(body: ResponsesRequest) -> list[Json]:
    """The conversation. Raises InvalidRequest with the path of what is no message."""
    messages: list[Json] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise InvalidRequest("input: expected a string or a list of messages", param="input")
    return messages + [_message(item, f"input[{i}]") for i, item in enumerate(body.input)]


def _message(item: Any, path: str) -> Json:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{path}: expected a message", param=path)
    if item.get("type", "message") != "message":
        raise InvalidRequest(f"{path}.type: only 'message' is supported", param=f"{path}.type")
    role, content = item.get("role"), item.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise InvalidRequest(f"{path}.role: expected system, developer, user or assistant", param=f"{path}.role")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise InvalidRequest(f"{path}.content: expected a string or a list of parts", param=f"{path}.content")
    texts = []
    for i, part in enumerate(content):
        here = f"{path}.content[{i}]"
        if not isinstance(part, dict) or part.get("type") not in TEXT_TYPES:
            raise InvalidRequest(f"{here}.type: expected one of {', '.join(TEXT_TYPES)}", param=f"{here}.type")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{here}.text: expected a string", param=f"{here}.text")
        texts.append(part["text"])
    return {"role": role, "content": "".join(texts)}
