"""The body of OpenAI's Responses API, as the chat that it asks for. Text and functions; nothing is stored.

Knows fields; the answer's shape is `responses_shape`'s.
"""

from __future__ import annotations

from typing import Any, ClassVar

from cluster.errors import InvalidRequest
from gateway.protocol import MAX_MESSAGES, Body, ChatCompletionRequest, parse_body
from gateway.responses_tools import add_item, chat_tool_choice, chat_tools, flat_path
from gateway.tools import MAX_TOOLS

Json = dict[str, Any]
TEXT_TYPES = ("input_text", "output_text", "text")

# Field → values that ask for nothing; as in `gateway.foreign_fields`, null always does.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
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

    MAX_LENGTHS: ClassVar = {"input": MAX_MESSAGES, "tools": MAX_TOOLS, "metadata": 16}

    model: str
    input: Any = None  # a string, or a list of messages; checked by `chat_of`
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Any = None  # this and `tool_choice`: checked by `responses_tools` and the chat
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None


def parse_responses_body(document: Json, num_bytes: int) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    """The typed body, and the chat that it asks for. Raises InvalidRequest; `renamed` gives it the client's field."""
    for name, harmless in _REFUSED.items():
        value = document.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            raise InvalidRequest(f"{name}: not supported by this server", param=name)
    body = parse_body(ResponsesRequest, {k: v for k, v in document.items() if k not in _REFUSED}, num_bytes)
    chat = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": _response_format(body),
        "tools": chat_tools(body.tools),
        "tool_choice": chat_tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    return body, parse_body(ChatCompletionRequest, chat, num_bytes)


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same about the field as the client wrote it."""
    for ours, theirs in _RENAMED.items():
        if error.param is not None and error.param.startswith(ours):
            return _at(error, theirs + error.param.removeprefix(ours))
    return error if error.param is None else _at(error, flat_path(error.param))


def _at(error: InvalidRequest, param: str) -> InvalidRequest:
    return type(error)(str(error).replace(str(error.param), param, 1), param=param)


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
    for i, item in enumerate(body.input):
        path = f"input[{i}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path}: expected a message", param=path)
        if not add_item(messages, item, path):
            messages.append(_message(item, path))
    return messages


def _message(item: Json, path: str) -> Json:
    if item.get("type", "message") != "message":
        expected = "expected message, function_call or function_call_output"
        raise InvalidRequest(f"{path}.type: {expected}", param=f"{path}.type")
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
