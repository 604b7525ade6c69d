"""`system` and `messages` of the Messages API as the messages of a chat. Knows blocks; keeps nothing.

text                  of a turn; several are lines of it
tool_use              a call in the assistant's turn
tool_result           a tool's turn before the user's text: a string, or texts, which are its lines
thinking              what the assistant thought before its turn, for chat templates that read it
redacted_thinking     nothing that anybody here could read
every other block     refused: images and documents, which no model here reads, and tools that Anthropic itself runs

Turns of one role that follow each other are one, joined once, whatever their number. A user's turn says something.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cluster.errors import InvalidRequest

Json = dict[str, Any]
_OF_USER, _OF_ASSISTANT = ("text", "tool_result"), ("text", "tool_use", "thinking", "redacted_thinking")


def chat_messages(system: Any, messages: Any) -> list[Json]:
    """The conversation. Raises InvalidRequest with the path of what is no message."""
    turns: list[list[Json]] = []  # each list is one turn of the chat
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: expected a list of messages", param="messages")
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{path}: expected an object", param=path)
        match message.get("role"):
            case "user":
                for turn in _user(message.get("content"), f"{path}.content"):
                    _add(turns, turn)
            case "assistant":
                _add(turns, _assistant(message.get("content"), f"{path}.content"))
            case _:
                raise InvalidRequest(f"{path}.role: expected user or assistant", param=f"{path}.role")
    said = [] if system is None else _texts(system, "system")
    return [*([{"role": "system", "content": "\n\n".join(said)}] if said else []), *map(_one, turns)]


def _add(turns: list[list[Json]], turn: Json) -> None:
    """A turn, or more of the last one."""
    if turns and turns[-1][0]["role"] == turn["role"] != "tool":
        turns[-1].append(turn)
    else:
        turns.append([turn])


def _one(parts: list[Json]) -> Json:
    """The turn that these are parts of."""
    if len(parts) == 1:
        return parts[0]
    turn: Json = {"role": parts[0]["role"], "content": "\n".join(part["content"] for part in parts if part["content"])}
    if thought := [part["reasoning_content"] for part in parts if "reasoning_content" in part]:
        turn["reasoning_content"] = "".join(thought)
    if calls := [call for part in parts for call in part.get("tool_calls", ())]:
        turn["tool_calls"] = calls
    return turn


def _user(content: Any, path: str) -> Iterator[Json]:
    """Results of tools as turns of their own, then what the user says."""
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    if content == []:
        raise InvalidRequest(f"{path}: must not be empty", param=path)
    said = []
    for block, here in _blocks(content, path, _OF_USER):
        if block["type"] == "text":
            said.append(_string(block, "text", here))
            continue
        result = block.get("content")
        text = "" if result is None else "\n".join(_texts(result, f"{here}.content"))
        if block.get("is_error") is True:
            text = f"Error: {text}"
        yield {"role": "tool", "tool_call_id": _name(block, "tool_use_id", here), "content": text}
    if said:
        yield {"role": "user", "content": "\n".join(said)}


def _assistant(content: Any, path: str) -> Json:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    said, thought, calls = [], [], []
    for block, here in _blocks(content, path, _OF_ASSISTANT):
        match block["type"]:
            case "text":
                said.append(_string(block, "text", here))
            case "thinking":
                thought.append(_string(block, "thinking", here))
            case "tool_use":
                calls.append(_call(block, here))
    turn: Json = {"role": "assistant", "content": "\n".join(said)}
    if thought:
        turn["reasoning_content"] = "".join(thought)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _call(block: Json, path: str) -> Json:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{path}.input: expected an object", param=f"{path}.input")
    function = {"name": _name(block, "name", path), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _name(block, "id", path), "type": "function", "function": function}


def _texts(content: Any, path: str) -> list[str]:
    """A string, or the texts of blocks."""
    if isinstance(content, str):
        return [content]
    return [_string(block, "text", here) for block, here in _blocks(content, path, ("text",))]


def _blocks(content: Any, path: str, kinds: tuple[str, ...]) -> Iterator[tuple[Json, str]]:
    """Each block with its path."""
    if not isinstance(content, list):
        raise InvalidRequest(f"{path}: expected a string or a list of blocks", param=path)
    for i, block in enumerate(content):
        here = f"{path}[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            names = ", ".join(kinds[:-1]) + f" or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
            raise InvalidRequest(f"{here}.type: expected {names}", param=f"{here}.type")
        yield block, here


def _string(block: Json, field: str, path: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{path}.{field}: expected a string", param=f"{path}.{field}")
    return value


def _name(block: Json, field: str, path: str) -> str:
    value = _string(block, field, path)
    if not value:
        raise InvalidRequest(f"{path}.{field}: must not be empty", param=f"{path}.{field}")
    return value
