"""A conversation with tools, checked, and its plain rendering for templates that know none. Knows roles and fields.

The plain rendering spells in text what later Mistral templates spell in special tokens:

- the tools stand before the last user message: `[AVAILABLE_TOOLS] [{…}][/AVAILABLE_TOOLS]` and a sentence that says how
  to call them;
- an assistant's calls are `[TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}]`, after its text if it has any;
- a tool's answer is a user message `[TOOL_RESULTS] {"content": …, "call_id": …}[/TOOL_RESULTS]`; neighbours are joined.

These markers are text, also to a vocabulary that has tokens for them. One in what a caller says gets a backslash before
it, and within JSON `\\u005b` for its bracket.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest
from gateway.json_bounds import check_bounds
from gateway.request.foreign_fields import refuse_in_message
from gateway.request.protocol import Message, text_of
from gateway.request.tools import Tool
from gateway.text.tokenizer import ChatMessage, is_json_of_no_text, parsed_json

_ID = re.compile(r"[a-zA-Z0-9]{9}")
_MARKERS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]")
_HOW_TO_CALL = 'To call tools, answer with [TOOL_CALLS] [{"name": "…", "arguments": {…}}] and nothing else.'


@dataclass(frozen=True)
class _Call:
    id: str
    name: str
    arguments: str  # JSON of an object, or what the client sent


def read_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """The messages as templates expect them. Raises InvalidRequest with the path of what is wrong."""
    chat = [_read(message, f"messages[{i}]") for i, message in enumerate(messages)]
    names: dict[str, str] = {}  # of the functions called, by id: some templates want them beside the results too
    for message in chat:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message.setdefault("name", names[message["tool_call_id"]])
    return chat


def speaks_of_tools(chat: Sequence[ChatMessage]) -> bool:
    """Whether any message calls a tool or answers a call."""
    return any(message["role"] == "tool" or "tool_calls" in message for message in chat)


def plain_rendering(chat: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    """The same conversation in messages of role and content alone."""
    turns: list[tuple[str, list[str]]] = []  # roles, and texts that are joined
    follows_results = False  # the last turn is one of results, and what the user said after them
    for message in chat:
        role, content = message["role"], _escaped(message["content"], "\\[")
        if role == "tool":
            result = {"content": message["content"], "call_id": message["tool_call_id"]}
            role, content = "user", f"[TOOL_RESULTS] {_dumps(result)}[/TOOL_RESULTS]"
        elif "tool_calls" in message:
            calls = [
                {
                    "name": call["function"]["name"],
                    "arguments": parsed_json(call["function"]["arguments"]),
                    "id": call["id"],
                }
                for call in message["tool_calls"]
            ]
            content = f"{content}\n[TOOL_CALLS] {_dumps(calls)}".lstrip()
        if follows_results and role == "user":
            turns[-1][1].append(content)
        else:
            turns.append((role, [content]))
            follows_results = message["role"] == "tool"
    plain: list[ChatMessage] = [{"role": role, "content": "\n".join(texts)} for role, texts in turns]
    if tools:
        _announce(plain, tools)
    return plain


def _announce(plain: list[ChatMessage], tools: Sequence[Tool]) -> None:
    available = _dumps([tool.definition for tool in tools])
    text = f"[AVAILABLE_TOOLS] {available}[/AVAILABLE_TOOLS]\n{_HOW_TO_CALL}"
    for i in reversed(range(len(plain))):
        if plain[i]["role"] == "user":
            plain[i] = {"role": "user", "content": f"{text}\n\n{plain[i]['content']}"}
            return
    plain.append({"role": "user", "content": text})


def _read(message: Message, path: str) -> ChatMessage:
    refuse_in_message(message.model_extra or {}, path)
    role = "system" if message.role == "developer" else message.role
    read: ChatMessage = {"role": role, "content": text_of(message, path)}
    if message.tool_calls and role != "assistant":
        raise InvalidRequest(f"{path}.tool_calls: only an assistant calls tools", param=f"{path}.tool_calls")
    if message.tool_calls:
        calls = _calls(message.tool_calls, f"{path}.tool_calls")
        read["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    if role == "assistant" and (thought := message.reasoning_content or message.reasoning):
        read["reasoning_content"] = thought
        if not (read["content"] and "tool_calls" in read):  # gpt-oss's template takes one of both
            read["thinking"] = thought  # its name for it
    if role == "tool":
        if not isinstance(message.tool_call_id, str) or not message.tool_call_id:
            raise InvalidRequest(f"{path}.tool_call_id: field required", param=f"{path}.tool_call_id")
        read["tool_call_id"] = _short_id(message.tool_call_id)
        if message.name is not None:
            read["name"] = message.name
    return read


def _calls(calls: Any, path: str) -> list[_Call]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{path}: expected a list", param=path)
    read = []
    for i, call in enumerate(calls):
        here = f"{path}[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidRequest(f"{here}.function: expected an object with name and arguments", f"{here}.function")
        arguments = function.get("arguments") or "{}"  # some clients say "" or null for none
        if isinstance(arguments, dict):  # as Mistral's clients may send them
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            where = f"{here}.function.arguments"
            raise InvalidRequest(f"{where}: expected a string of JSON or an object", param=where)
        check_json(arguments, f"{here}.function.arguments")
        call_id = call.get("id")
        read.append(_Call(_short_id(call_id if isinstance(call_id, str) else str(i)), function["name"], arguments))
    return read


def check_json(text: str, path: str) -> None:
    """JSON within a string was neither bounded nor looked at with the body that it came in. Raises InvalidRequest."""
    try:
        check_bounds(text.encode(), "it")
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error.message}", param=path) from None
    if is_json_of_no_text(text):
        raise InvalidRequest(f"{path}: a lone surrogate is not text", param=path)


def _short_id(call_id: str) -> str:
    """Mistral's templates take ids of nine letters and digits only; any other has nine of its own for ever."""
    if _ID.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=5).hexdigest()[:9]


def _dumps(value: Any) -> str:
    """JSON without markers: only its strings can hold one, and they may spell the bracket otherwise."""
    return _escaped(json.dumps(value, ensure_ascii=False), r"\u005b")


def _escaped(text: str, bracket: str) -> str:
    """Not by an expression: that holds the interpreter for seconds where a text is all brackets."""
    for marker in _MARKERS:
        text = text.replace(marker, bracket + marker[1:])
    return text
