"""`tools` and `tool_choice` become what the model is told and what it may answer. Knows fields; renders nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import InvalidRequest
from cluster.messages import Answer, JsonSchema, ToolCallGrammar, ToolTokens
from gateway.request.structured_schema import NotEnforceable, checked_schema

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 262_144  # over all tools
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: dict[str, Any]  # a JSON Schema
    schema: JsonSchema  # that its arguments are held to: any object, where `refusal` says why not to `parameters`
    refusal: NotEnforceable | None

    @property
    def definition(self) -> dict[str, Any]:
        """As templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class _Choice:
    """What `tool_choice` asks for."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None  # of those that may be called; None: any
    is_single: bool = False  # exactly one call


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Raises InvalidRequest with the path of what is wrong."""
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidRequest("tools: expected a list", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS} entries, got {len(tools)}", param="tools")
    read = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [tool.name for tool in read]
    for i, name in enumerate(names):
        if name in names[:i]:
            path = f"tools[{i}].function.name"
            raise InvalidRequest(f"{path}: the name {name!r} is used twice", param=path)
    if sum(len(tool.schema.text) for tool in read) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"tools: at most {MAX_SCHEMA_BYTES} bytes of parameters in all", param="tools")
    return read


def answer_grammar(
    tools: tuple[Tool, ...],
    tool_choice: Any,
    parallel: bool | None,
    answer: Answer | None,
    tokens: ToolTokens,
) -> Answer | ToolCallGrammar | None:
    """What may be answered: calls, text, or what `answer` holds a text to. Raises InvalidRequest for a wrong choice.

    Tools that may be called and need not be are known by any JSON object where their schema cannot be enforced.
    """
    choice = _read_choice(tool_choice)
    known = {tool.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise InvalidRequest(f"tool_choice: there is no tool {name!r} in tools", param="tool_choice")
    is_required = choice.mode == "required"
    if is_required and not tools:
        raise InvalidRequest(f"tool_choice: {tool_choice!r} needs tools", param="tool_choice")
    if not tools or (choice.mode == "none" and answer is not None):
        return answer
    callable_ = [
        tool for tool in tools if choice.mode != "none" and (choice.names is None or tool.name in choice.names)
    ]
    refusal = next((tool.refusal for tool in callable_ if tool.refusal is not None), None)
    if is_required and refusal is not None:
        raise refusal
    return ToolCallGrammar(
        tools=tuple((tool.name, tool.schema) for tool in callable_),
        required=is_required,
        parallel=parallel is not False and not choice.is_single,
        answer=answer,
        tokens=tokens,
    )


def _tool(tool: Any, path: str) -> Tool:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise InvalidRequest(f"{path}: expected a tool of type 'function'", param=path)
    function = tool.get("function")
    path = f"{path}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path}: expected an object with name and parameters", param=path)
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{path}.name: expected 1 to 64 letters, digits, _ . or -", param=f"{path}.name")
    if not isinstance(description, str):
        raise InvalidRequest(f"{path}.description: expected a string", param=f"{path}.description")
    parameters = function.get("parameters") or _NO_ARGUMENTS
    schema, refusal = JsonSchema('{"type": "object"}', f"{path}.parameters"), None
    try:
        schema = checked_schema(parameters, f"{path}.parameters")
    except NotEnforceable as error:
        if function.get("strict"):
            raise
        refusal = error
    return Tool(name, description, parameters, schema, refusal)


def _read_choice(tool_choice: Any) -> _Choice:
    match tool_choice:
        case None:
            return _Choice("auto")
        case "none" | "auto" | "required":
            return _Choice(tool_choice)
        case "any":
            return _Choice("required")
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}} if (
            0 < len(tools) <= MAX_TOOLS
        ):
            names = [_name_of(tool) for tool in tools]
            if None not in names:
                return _Choice(mode, tuple(map(str, names)))
        case dict() if (name := _name_of(tool_choice)) is not None:
            return _Choice("required", (name,), is_single=True)
    raise InvalidRequest(
        "tool_choice: expected none, auto, any, required, {'type': 'function', 'function': {'name': …}} or {'type': "
        "'allowed_tools', 'allowed_tools': {'mode': 'auto' or 'required', 'tools': […]}}",
        param="tool_choice",
    )


def _name_of(tool: Any) -> str | None:
    """Of `{"type": "function", "function": {"name": …}}`."""
    match tool:
        case {"function": {"name": str() as name}} if tool.get("type", "function") == "function":
            return str(name)
    return None
