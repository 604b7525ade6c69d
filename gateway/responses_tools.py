"""Functions in the Responses API: its tools, choice and items under the names that a chat has. Knows fields only.

tools         {"type": "function", "name": …, "parameters": {…}}        one level flatter than a chat's
tool_choice   none, auto, required, or {"type": "function", "name": …}
input         {"type": "function_call", "call_id", "name", "arguments"} and {"type": "function_call_output", …}
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import InvalidRequest
from gateway.tools_reader import ToolCall

Json = dict[str, Any]
_FUNCTION = re.compile(r"(?<=^tools)(\[\d+\])\.function")


def chat_tools(tools: Any) -> Any:
    """A chat's `tools`. Raises InvalidRequest for one that is no function."""
    if not isinstance(tools, list):
        return tools  # the chat says what is wrong
    return [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def chat_tool_choice(choice: Any) -> Any:
    """A chat's `tool_choice`. Raises InvalidRequest."""
    if isinstance(choice, dict):
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            expected = "none, auto, required, or {'type': 'function', 'name': …}"
            raise InvalidRequest(f"tool_choice: expected {expected}", param="tool_choice")
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def flat_path(path: str) -> str:
    """`tools[0].function.name` of a chat is `tools[0].name` here."""
    return _FUNCTION.sub(r"\1", path)


def add_item(messages: list[Json], item: Json, path: str) -> bool:
    """Whether it is a call or a call's result, which `messages` then end in. Raises InvalidRequest."""
    if item.get("type") == "function_call":
        call_id, name, arguments = (_string(item, field, path) for field in ("call_id", "name", "arguments"))
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if not (messages and messages[-1]["role"] == "assistant"):
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
        return True
    if item.get("type") == "function_call_output":
        call_id, output = _string(item, "call_id", path), _string(item, "output", path)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        return True
    return False


def call_item(item_id: str, call: ToolCall, *, status: str = "completed") -> Json:
    """One call as an item of the output; one in progress has no arguments yet."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments if status == "completed" else "",
    }


def _chat_tool(tool: Any, path: str) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise InvalidRequest(f"{path}.type: only 'function' is supported", param=f"{path}.type")
    return {
        "type": "function",
        "function": {name: tool.get(name) for name in ("name", "description", "parameters", "strict")},
    }


def _string(item: Json, field: str, path: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{path}.{field}: expected a string", param=f"{path}.{field}")
    return value
