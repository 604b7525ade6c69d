"""Functions in the Responses API: its tools and choice under the names that a chat has. Knows fields only.

tools         {"type": "function", "name": …, "parameters": {…}}        one level flatter than a chat's
tool_choice   none, auto, required, {"type": "function", "name": …}, or
              {"type": "allowed_tools", "mode": "auto" or "required", "tools": [{"type": "function", "name": …}]}

A tool of another type, which OpenAI itself would run, is refused.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import InvalidRequest
from gateway.answer.calls import ToolCall

Json = dict[str, Any]
_FUNCTION = re.compile(r"(?<=^tools)(\[\d+\])\.function")


def chat_tools(tools: Any) -> Any:
    """A chat's `tools`. Raises InvalidRequest for one that is no function."""
    if not isinstance(tools, list):
        return tools  # the chat says what is wrong
    return [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def chat_tool_choice(choice: Any) -> Any:
    """A chat's `tool_choice`. Raises InvalidRequest."""
    if not isinstance(choice, dict):
        return choice  # the chat says what is wrong
    match choice:
        case {"type": "function", "name": str()}:
            return _chosen(choice)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*tools]} if tools and all(
            isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("name"), str)
            for tool in tools
        ):
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(map(_chosen, tools))}}
    raise InvalidRequest(
        "tool_choice: expected none, auto, required, {'type': 'function', 'name': …} or {'type': 'allowed_tools', "
        "'mode': 'auto' or 'required', 'tools': [{'type': 'function', 'name': …}]}",
        param="tool_choice",
    )


def flat_path(path: str) -> str:
    """`tools[0].function.name` of a chat is `tools[0].name` here."""
    return _FUNCTION.sub(r"\1", path)


def call_item(item_id: str, call: ToolCall, *, status: str) -> Json:
    """One call as an item of the output."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _chosen(tool: Json) -> Json:
    return {"type": "function", "function": {"name": tool["name"]}}


def _chat_tool(tool: Any, path: str) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise InvalidRequest(f"{path}.type: only 'function' is supported", param=f"{path}.type")
    callers = tool.get("allowed_callers")
    if callers is not None and (not isinstance(callers, list) or "direct" not in callers):
        where = f"{path}.allowed_callers"
        raise InvalidRequest(f"{where}: functions are called by the model only; expected 'direct' in it", param=where)
    return {
        "type": "function",
        "function": {name: tool.get(name) for name in ("name", "description", "parameters", "strict")},
    }
