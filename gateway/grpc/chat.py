"""Messages, tools and formats of chat.proto under the HTTP bodies' names. Knows fields; bounds are the validator's.

A field that is empty or unset is one that a body does not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.errors import InvalidRequest
from gateway.answer.calls import ToolCall
from gateway.grpc.proto import chat_pb2
from gateway.json_object import parse_object

_CHOICES = ("none", "auto", "any", "required")


def chat_fields(request: chat_pb2.ChatRequest) -> dict[str, Any]:
    """All but the sampling; only what is set. Raises InvalidRequest for what is no JSON."""
    fields = conversation_fields(request) | template_fields(request)
    if request.allowed_tools:
        names = [{"type": "function", "function": {"name": name}} for name in request.allowed_tools]
        allowed = {"mode": request.tool_choice or "auto", "tools": names}
        fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    elif request.tool_choice in _CHOICES:
        fields["tool_choice"] = request.tool_choice
    elif request.tool_choice:
        fields["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    fields |= set_fields(request, "parallel_tool_calls", "safe_prompt", "echo", "include_reasoning")
    return fields | answer_fields(request)


def answer_fields(request: chat_pb2.ChatRequest | chat_pb2.GenerateRequest) -> dict[str, Any]:
    """What the answer is held to. Raises InvalidRequest for what is no JSON."""
    fields: dict[str, Any] = {}
    if request.HasField("response_format"):
        fields["response_format"] = _format(request.response_format)
    if request.HasField("structured_outputs"):
        outputs = request.structured_outputs
        constraint = outputs.WhichOneof("constraint")
        options = set_fields(outputs, "disable_any_whitespace")
        if constraint == "choice":
            options["choice"] = list(outputs.choice.choices)
        elif constraint:
            options[constraint] = getattr(outputs, constraint)
        fields["structured_outputs"] = options
    return fields


def template_fields(request: chat_pb2.ChatRequest | chat_pb2.TokenizeRequest) -> dict[str, Any]:
    """How the conversation becomes a prompt. Raises InvalidRequest for what is no JSON."""
    fields = set_fields(request, "add_special_tokens", "add_generation_prompt", "continue_final_message")
    if request.chat_template_kwargs:
        fields["chat_template_kwargs"] = _object(request.chat_template_kwargs, "chat_template_kwargs", "an object")
    if request.reasoning_effort:
        fields["reasoning_effort"] = request.reasoning_effort
    return fields


def set_fields(message: Any, *names: str) -> dict[str, Any]:
    """Those of the optional fields that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def conversation_fields(conversation: chat_pb2.ChatRequest | chat_pb2.Conversation) -> dict[str, Any]:
    """Messages and tools. Raises InvalidRequest for what is no JSON."""
    fields: dict[str, Any] = {"messages": [_message(message) for message in conversation.messages]}
    if conversation.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}].function.parameters") for i, tool in enumerate(conversation.tools)]
    return fields


def call_messages(calls: Iterable[ToolCall]) -> list[chat_pb2.ToolCall]:
    """The calls of an answer, or pieces of them."""
    return [chat_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments, index=call.index) for call in calls]


def _message(message: chat_pb2.Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.name:
        fields["name"] = message.name
    if message.reasoning_content:
        fields["reasoning_content"] = message.reasoning_content
    return fields | set_fields(message, "prefix")


def _call(call: chat_pb2.ToolCall) -> dict[str, Any]:
    function = {name: value for name, value in (("name", call.name), ("arguments", call.arguments)) if value}
    return {"function": function, "index": call.index} | ({"id": call.id} if call.id else {})


def _tool(tool: chat_pb2.Tool, path: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters:
        function["parameters"] = _schema(tool.parameters, path)
    return {"type": "function", "function": function | set_fields(tool, "strict")}


def _format(response_format: chat_pb2.ResponseFormat) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": response_format.type}
    if response_format.json_schema and response_format.type == "json_object":
        fields["schema"] = _schema(response_format.json_schema, "response_format.schema")
    elif response_format.json_schema:
        schema = _schema(response_format.json_schema, "response_format.json_schema.schema")
        fields["json_schema"] = {"schema": schema}
    return fields


def _schema(text: str, path: str) -> dict[str, Any]:
    return _object(text, path, "a JSON Schema, an object")


def _object(text: str, path: str, expected: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode(), "it")
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: expected {expected}: {error.message}", param=path) from None
