"""`instructions` and `input` of the Responses API as the messages of a chat. Knows items and parts; keeps nothing.

message                 a turn; those of the system and of the developer that come first are one, as templates take one
function_call           a call in the assistant's turn before it, or in one of its own
function_call_output    a tool's turn: a string, or parts, which are its lines
reasoning               what the assistant thought before the next turn of its own, for chat templates that read it
item_reference          refused: nothing is stored, so there is nothing that it could mean
every other item        refused: they are calls and results of tools that OpenAI itself runs
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from cluster.errors import InvalidRequest
from gateway.request.tools_history import check_json

Json = dict[str, Any]
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
PART_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # by type: its field
ROLES = ("system", "developer", "user", "assistant")
_INSTRUCTING = ("system", "developer")
_MORE = "more"  # of a message under way: by field, texts that follow the one that it has


def chat_messages(instructions: str | None, items: Any) -> list[Json]:
    """The conversation. Raises InvalidRequest with the path of what is no message."""
    messages: list[Json] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise InvalidRequest("input: expected a string or a list of messages", param="input")
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    _drop_mere_thought(messages)
    return _with_one_system(list(map(_joined, messages)))


def _add(messages: list[Json], item: Any, path: str) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{path}: expected an object", param=path)
    kind = item.get("type")
    if kind is None:
        kind = "item_reference" if "role" not in item and "id" in item else "message"
    if kind != "reasoning" and not (kind == "function_call" or item.get("role") == "assistant"):
        _drop_mere_thought(messages)
    match kind:
        case "message":
            message = _message(item, path)
            if message["role"] == "assistant" and messages and _is_of_one_answer(messages[-1]):
                _extend(messages[-1], "content", message["content"])
            else:
                messages.append(message)
        case "function_call":
            _add_call(messages, item, path)
        case "function_call_output":
            output = _text(item.get("output"), f"{path}.output", separator="\n")
            messages.append({"role": "tool", "tool_call_id": _name(item, "call_id", path), "content": output})
        case "reasoning":
            _add_thought(messages, item)
        case "item_reference":
            raise InvalidRequest(
                f"{path}.type: 'item_reference' means nothing here, where no item is stored; send the item itself",
                param=f"{path}.type",
            )
        case _:
            raise InvalidRequest(
                f"{path}.type: expected {', '.join(ITEM_TYPES[:-1])} or {ITEM_TYPES[-1]}", param=f"{path}.type"
            )


def _extend(message: Json, field: str, text: str) -> None:
    """More of a message. Its texts are joined once: text by text would take the square of their number."""
    if message[field]:
        message.setdefault(_MORE, {}).setdefault(field, []).append(text)
    else:
        message[field] = text


def _joined(message: Json) -> Json:
    """The message, and no more under way."""
    more = message.pop(_MORE, {})
    return message | {field: "".join((message[field], *texts)) for field, texts in more.items()}


def _add_thought(messages: list[Json], item: Json) -> None:
    """What an assistant's next turn was thought by. An item of another server may say nothing that is read here."""
    content = item.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    thought = "".join(text for text in parts if isinstance(text, str))
    if messages and _is_mere_thought(messages[-1]):
        _extend(messages[-1], "reasoning_content", thought)
    elif thought:
        messages.append({"role": "assistant", "content": "", "reasoning_content": thought})


def _is_mere_thought(message: Json) -> bool:
    return "reasoning_content" in message and not (message["content"] or "tool_calls" in message)


def _drop_mere_thought(messages: list[Json]) -> None:
    """The answer that it was to lead to never came."""
    if messages and _is_mere_thought(messages[-1]):
        messages.pop()


def _is_of_one_answer(message: Json) -> bool:
    """Whether a text that follows is of the same answer: it was thought only, or no call of it has a result yet."""
    return "tool_calls" in message or _is_mere_thought(message)


def _message(item: Json, path: str) -> Json:
    if item.get("role") not in ROLES:
        raise InvalidRequest(f"{path}.role: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}", param=f"{path}.role")
    return {"role": item["role"], "content": _text(item.get("content"), f"{path}.content", separator="")}


def _add_call(messages: list[Json], item: Json, path: str) -> None:
    call_id, arguments = (_string(item, field, path) for field in ("call_id", "arguments"))
    name = _name(item, "name", path)
    check_json(arguments, f"{path}.arguments")  # here, where its path is known: turns have other numbers than items
    if not (messages and messages[-1]["role"] == "assistant"):
        messages.append({"role": "assistant", "content": ""})
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: Any, path: str, *, separator: str) -> str:
    """A string, or the texts of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path}: expected a string or a list of parts", param=path)
    return separator.join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    field = PART_TEXTS.get(str(part.get("type"))) if isinstance(part, dict) else None
    if field is None:
        raise InvalidRequest(f"{path}.type: expected one of {', '.join(PART_TEXTS)}", param=f"{path}.type")
    return _string(part, field, path)


def _string(item: Json, field: str, path: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{path}.{field}: expected a string", param=f"{path}.{field}")
    return value


def _name(item: Json, field: str, path: str) -> str:
    value = _string(item, field, path)
    if not value:
        raise InvalidRequest(f"{path}.{field}: must not be empty", param=f"{path}.{field}")
    return value


def _with_one_system(messages: Sequence[Json]) -> list[Json]:
    """The same with what instructs the model before anybody speaks in one message."""
    first = list(takewhile(lambda message: message["role"] in _INSTRUCTING, messages))
    if len(first) < 2:
        return list(messages)
    joined = "\n\n".join(message["content"] for message in first)
    return [{"role": "system", "content": joined}, *messages[len(first) :]]
