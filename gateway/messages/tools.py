"""Tools of the Messages API under the names that a chat has. Knows fields only.

tools         {"name": …, "description": …, "input_schema": {…}}, of type "custom" if they say one
tool_choice   {"type": "auto", "any", "none" or "tool" with a name, "disable_parallel_tool_use": …}

A tool of another type, which Anthropic or the client's own harness defines, is refused.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequest

Json = dict[str, Any]
_MODES = {"auto": "auto", "any": "required", "none": "none"}


def chat_tools(tools: Any) -> Any:
    """A chat's `tools`. Raises InvalidRequest for one that is no tool of the caller's own."""
    if not isinstance(tools, list):
        return tools  # the chat says what is wrong
    return [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def chat_tool_choice(choice: Any) -> tuple[Any, bool | None]:
    """A chat's `tool_choice`, and whether several calls may come at once. Raises InvalidRequest."""
    if choice is None:
        return None, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool" and isinstance(choice.get("name"), str):
        chosen: Any = {"type": "function", "function": {"name": choice["name"]}}
    elif isinstance(kind, str) and kind in _MODES:
        chosen = _MODES[kind]
    else:
        raise InvalidRequest(
            "tool_choice: expected {'type': 'auto'}, 'any' or 'none' for it, or {'type': 'tool', 'name': …}",
            param="tool_choice",
        )
    return chosen, False if choice.get("disable_parallel_tool_use") is True else None


def _chat_tool(tool: Any, path: str) -> Json:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"{path}: expected an object", param=path)
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequest(f"{path}.type: only 'custom' is supported", param=f"{path}.type")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}
