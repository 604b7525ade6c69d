"""The body of Anthropic's Messages API, as the chat that it asks for. Text and tools; nothing is stored.

Knows fields; the conversation is `input`'s, the answer's shape `shape`'s. A field that is not named here is a hint (to
caches, to billing) and changes nothing.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from cluster.errors import InvalidRequest
from gateway.messages.input import chat_messages
from gateway.messages.tools import chat_tool_choice, chat_tools
from gateway.request.foreign_fields import without_refused
from gateway.request.protocol import MAX_MESSAGES, Body, ChatCompletionRequest, Integer, Strings, parse_body
from gateway.request.tools import MAX_TOOLS

Json = dict[str, Any]

# What would be done by a service of Anthropic's own: by name, and the values that ask for nothing beside null.
REFUSED: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": (), "context_management": ({},)}
_RENAMED = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
_PARAMETERS = re.compile(r"^(tools\[\d+\])\.function(\.parameters)?")


class Thinking(Body):
    """Whether the model shall think before it answers, where its chat template asks. A budget is a hint."""

    type: Literal["enabled", "adaptive", "disabled"]


class OutputConfig(Body):
    """What the answer's text is held to: `{"format": {"type": "json_schema", "schema": {…}}}`."""

    format: Json | None = None
    effort: str | None = None  # a hint


class CountTokensRequest(Body):
    """Body of POST /v1/messages/count_tokens: what of a request makes its prompt."""

    MAX_LENGTHS: ClassVar = {"messages": MAX_MESSAGES, "system": MAX_MESSAGES, "tools": MAX_TOOLS}

    model: str | None = None
    messages: Any = None  # these four: checked by `input`, by `tools` and by the chat
    system: Any = None
    tools: Any = None
    tool_choice: Any = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    MAX_LENGTHS: ClassVar = CountTokensRequest.MAX_LENGTHS | {"stop_sequences": 16}

    max_tokens: Integer
    stop_sequences: Strings | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    output_config: OutputConfig | None = None


def parse_messages_body(document: Json, num_bytes: int) -> tuple[MessagesRequest, ChatCompletionRequest]:
    """The typed body, and the chat that it asks for. Raises InvalidRequest; `renamed` gives it the client's field."""
    body = parse_body(MessagesRequest, without_refused(document, REFUSED), num_bytes)
    if body.max_tokens < 1:
        raise InvalidRequest("max_tokens: expected at least 1", param="max_tokens")
    chat = _of_prompt(body) | {
        "max_completion_tokens": body.max_tokens,
        "stop": body.stop_sequences or None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "response_format": _response_format(body.output_config),
    }
    return body, parse_body(ChatCompletionRequest, chat, num_bytes)


def parse_count_body(document: Json, num_bytes: int) -> ChatCompletionRequest:
    """The chat of a body that only asks how long its prompt is."""
    body = parse_body(CountTokensRequest, without_refused(document, REFUSED), num_bytes)
    return parse_body(ChatCompletionRequest, _of_prompt(body), num_bytes)


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same about the field as the client wrote it."""
    if error.param is None:
        return error
    param = _PARAMETERS.sub(lambda found: found[1] + (".input_schema" if found[2] else ""), error.param)
    for ours, theirs in _RENAMED.items():
        if param == ours or param.startswith((f"{ours}.", f"{ours}[")):
            param = theirs + param.removeprefix(ours)
            break
    return type(error)(str(error).replace(error.param, param, 1), param=param)


def _of_prompt(body: CountTokensRequest) -> Json:
    """The fields of a chat that decide its prompt."""
    choice, parallel = chat_tool_choice(body.tool_choice)
    messages = chat_messages(body.system, body.messages)
    goes_on = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    return {
        "model": body.model,
        "messages": messages,
        "continue_final_message": goes_on or None,  # an assistant's turn at the end; only what is new is answered
        "tools": chat_tools(body.tools),
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "reasoning_effort": "none" if body.thinking is not None and body.thinking.type == "disabled" else None,
    }


def _response_format(config: OutputConfig | None) -> Json | None:
    """As a chat has it: what describes a schema is one level deeper there, and has a name."""
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        where = "output_config.format.type"
        raise InvalidRequest(f"{where}: expected 'json_schema'", param=where)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": config.format.get("schema")}}
