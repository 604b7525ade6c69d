"""Reads tool calls out of an output's text. Knows the spellings that the grammar of calls enforces; knows no streams.

    [TOOL_CALLS] [{"name": "f", "arguments": {…}}, {"name": "g", "arguments": {…}}]      ToolCallReader
    [TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[ARGS]{…}                                         SpelledCallReader

The marker is a special token, or text where the vocabulary has none; what comes before the token, or is no marker, is
the answer's own text. A call is handed on once it is complete; one that `max_tokens` cuts never is.
"""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import dataclass
from typing import Literal

from cluster.messages import ToolCallGrammar

_ALPHABET = string.ascii_letters + string.digits
_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One complete call."""

    index: int  # among the calls of its choice
    id: str  # 9 letters and digits, as Mistral's
    name: str
    arguments: str  # JSON, as the model wrote it


def new_call_id() -> str:
    """At random."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class ToolCallReader:
    """`push` each token and its text, then `flush`; `take` gives the calls that became complete."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self._marker = grammar.marker
        self._marker_token_id = grammar.tokens.calls
        self._is_text = False  # decided: no marker can come any more
        self._held = ""  # what may still be the marker; in the calls, what is read of the present one
        self._in_calls = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._calls: list[ToolCall] = []
        self.num_calls = 0

    def push(self, token_id: int, text: str) -> str:
        """The part of `text` that is the answer's own."""
        if self._in_calls:
            return self._read(text)
        if self._marker_token_id is not None:
            self._in_calls = token_id == self._marker_token_id
            return text
        if self._is_text:
            return text
        self._held += text
        begin = self._held.lstrip(" \n")
        if begin.startswith(self._marker):
            self._in_calls, self._held = True, ""
            return self._read(begin.removeprefix(self._marker))
        if self._marker.startswith(begin):
            return ""
        self._is_text = True
        return self.flush()

    def flush(self, *, has_ended: bool = False) -> str:  # noqa: ARG002
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return "" if self._in_calls else held

    def take(self) -> tuple[ToolCall, ...]:
        """The calls that became complete since the last time."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def _read(self, text: str) -> str:
        """Depth 1 is the list of calls, depth 2 a call. What stands where a call should and is none is returned."""
        own = ""
        for char in text:
            if self._depth >= 2 or char == "{":
                self._held += char
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth == 1:
                    own += self._complete()
        return own

    def _complete(self) -> str:
        text, self._held = self._held, ""
        call = _call(text)
        if call is None:
            return text
        self._calls.append(ToolCall(self.num_calls, new_call_id(), *call))
        self.num_calls += 1
        return ""


class SpelledCallReader:
    """The same for calls that are spelled with a special token before each part."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self._tokens = grammar.tokens
        self._part: Literal["text", "name", "id", "arguments"] = "text"
        self._parts: dict[str, str] = {}  # of the present call
        self._calls: list[ToolCall] = []
        self.num_calls = 0

    def push(self, token_id: int, text: str) -> str:
        """The part of `text` that is the answer's own."""
        if token_id == self._tokens.calls:
            self._complete(has_ended=True)
            self._parts, self._part = dict.fromkeys(("name", "id", "arguments"), ""), "name"
        elif self._part == "text":
            return text
        elif token_id == self._tokens.args:
            self._part = "arguments"
        elif token_id == self._tokens.call_id:
            self._part = "id"
        else:
            self._parts[self._part] += text
        return ""

    def flush(self, *, has_ended: bool) -> str:
        """Nothing was held back. The last call is complete if the output ended by itself, or it is an object."""
        self._complete(has_ended=has_ended)
        return ""

    def take(self) -> tuple[ToolCall, ...]:
        """The calls that became complete since the last time."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def _complete(self, *, has_ended: bool) -> None:
        if self._part != "arguments":
            return
        name, call_id, arguments = (self._parts[part].strip() for part in ("name", "id", "arguments"))
        self._part = "text"
        if not _is_json(arguments) or not (has_ended or arguments[0] in "{["):
            return
        is_id = len(call_id) == 9 and all(char in _ALPHABET for char in call_id)
        self._calls.append(ToolCall(self.num_calls, call_id if is_id else new_call_id(), name, arguments))
        self.num_calls += 1


def tool_call_reader(grammar: ToolCallGrammar) -> ToolCallReader | SpelledCallReader:
    """The one for that spelling."""
    return ToolCallReader(grammar) if grammar.tokens.args is None else SpelledCallReader(grammar)


def _call(text: str) -> tuple[str, str] | None:
    """Name and arguments; None if it is no call, whatever else the model wrote."""
    if not text.startswith(_NAME):
        return None
    try:
        name, end = json.JSONDecoder().raw_decode(text, len(_NAME))
    except (ValueError, RecursionError):
        return None
    arguments = text[end + len(_ARGUMENTS) : -1]
    if not isinstance(name, str) or not text.startswith(_ARGUMENTS, end) or not _is_json(arguments):
        return None
    return name, arguments


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
