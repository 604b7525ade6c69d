"""Reads tool calls out of an output's text. Knows the spelling that the grammar of calls enforces; knows no streams.

    [TOOL_CALLS] [{"name": "f", "arguments": {…}}, {"name": "g", "arguments": {…}}]

The marker is a special token, or text where the vocabulary has none; what comes before the token, or is no marker, is
the answer's own text. A call is handed on once it is complete; one that `max_tokens` cuts never is.
"""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import dataclass

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
    """`push` each token and its text; `calls` has those that became complete since `take`."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self._marker = grammar.marker
        self._marker_token_id = grammar.marker_token_id
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
            self._read(text)
            return ""
        if self._marker_token_id is not None:
            self._in_calls = token_id == self._marker_token_id
            return text
        if self._is_text:
            return text
        self._held += text
        begin = self._held.lstrip(" \n")
        if begin.startswith(self._marker):
            self._in_calls, self._held = True, ""
            self._read(begin.removeprefix(self._marker))
            return ""
        if self._marker.startswith(begin):
            return ""
        self._is_text = True
        return self.flush()

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return "" if self._in_calls else held

    def take(self) -> tuple[ToolCall, ...]:
        """The calls that became complete since the last time."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def _read(self, text: str) -> None:
        """Depth 1 is the list of calls, depth 2 a call."""
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
                    self._complete()

    def _complete(self) -> None:
        call, self._held = self._held, ""
        name, end = json.JSONDecoder().raw_decode(call, len(_NAME))
        self._calls.append(ToolCall(self.num_calls, new_call_id(), name, call[end + len(_ARGUMENTS) : -1]))
        self.num_calls += 1
