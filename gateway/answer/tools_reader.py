"""Reads tool calls as Mistral's models write them. Knows the spellings that the grammar enforces; knows no streams.

    [TOOL_CALLS] [{"name": "f", "arguments": {…}}, {"name": "g", "arguments": {…}}]      ToolCallReader
    [TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[ARGS]{…}                                         SpelledCallReader

The marker is a special token, or text where the vocabulary has none; what comes before the token, or is no marker, is
the answer's own text. A call is handed on in pieces as it is written, once its name is whole: a name that `max_tokens`
cuts is text. Nothing that a model wrote raises: arguments are handed on as they are, JSON or not.
"""

from __future__ import annotations

import json
from typing import Literal

from cluster.messages import ToolCallGrammar
from gateway.answer.calls import Calls
from gateway.answer.hermes_reader import HermesCallReader
from gateway.answer.json_call import Brackets, is_json
from gateway.answer.llama_reader import LlamaCallReader

_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '


class ToolCallReader:
    """`push` each token and its text, then `flush`; `calls` has what was read."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self.calls = Calls()
        self._marker = grammar.marker
        self._marker_token_id = grammar.tokens.calls
        self._is_required = grammar.required
        self._is_text = False  # decided: no marker can come any more
        self._held = ""  # what may still be the marker; in the calls, the present one's text before its arguments
        self._is_blank = True  # all that is held
        self._in_calls = False
        self._in_arguments = False
        self._brackets = Brackets()

    @property
    def is_complete(self) -> bool:
        """Whether no call is open."""
        return not self._in_arguments and not self._held

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
        self._is_blank = self._is_blank and not text.strip(" \n")
        if self._is_blank:  # not looked at once more with every token, for blanks may be many
            return ""
        begin = self._held.lstrip(" \n")
        if begin.startswith(self._marker):
            self._in_calls, self._held = True, ""
            return self._read(begin.removeprefix(self._marker))
        if self._marker.startswith(begin):
            return ""
        self._is_text = True
        held, self._held = self._held, ""
        return held

    def flush(self, *, has_ended: bool) -> str:
        """What was held back and is the answer's own, once nothing follows; a call that is cut loses nothing."""
        if not self._held or self._in_arguments:
            return ""
        if self._in_calls:
            name = _whole_name(self._held)
            if name is None:
                return self._held
            self.calls.begin(name)
            return ""
        # Two characters of the marker, cut, are the marker's; a text may begin with one of them.
        least = 1 if self._is_required else 2
        is_marker = not has_ended and len(self._held.lstrip(" \n")) >= least
        return "" if is_marker else self._held

    def _read(self, text: str) -> str:
        """Depth 1 is the list of calls, depth 2 a call. What stands where a call should and is none is returned."""
        own = ""
        arguments: list[str] = []
        for char in text:
            ends_call = self._brackets.closed_by(char) and self._brackets.depth == 1
            if ends_call and self._in_arguments:
                self.calls.add("".join(arguments))
                arguments, self._in_arguments = [], False
            elif ends_call and self._held:
                own += self._held + char
                self._held = ""
            elif self._in_arguments:
                arguments.append(char)
            elif self._brackets.depth >= 2:
                name = self._name_before_arguments()
                if name is None:
                    self._held += char
                else:
                    self.calls.begin(name)
                    arguments, self._held, self._in_arguments = [char], "", True
        if arguments:
            self.calls.add("".join(arguments))
        return own

    def _name_before_arguments(self) -> str | None:
        """The call's name, if arguments are what comes next."""
        return _whole_name(self._held, _ARGUMENTS) if self._held.endswith(_ARGUMENTS) else None


class SpelledCallReader:
    """The same for calls that are spelled with a special token before each part."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self.calls = Calls()
        self.is_complete = True  # every call that is over
        self._tokens = grammar.tokens
        self._part: Literal["text", "name", "id", "arguments"] = "text"
        self._parts: dict[str, str] = {}  # of the present call; its arguments are here once they have begun
        self._arguments: list[str] = []

    def push(self, token_id: int, text: str) -> str:
        """The part of `text` that is the answer's own."""
        if token_id == self._tokens.calls:
            own = self._end()
            self._parts, self._part = {"name": "", "id": ""}, "name"
            return own
        if self._part == "text":
            return text
        if token_id == self._tokens.args:
            self._part = "arguments"
        elif token_id == self._tokens.call_id:
            self._part = "id"
        elif self._part != "arguments":
            self._parts[self._part] += text
        elif self._arguments or (text := text.lstrip()):
            self._begin()
            self._arguments.append(text)
            self.calls.add(text)
        return ""

    def flush(self, *, has_ended: bool) -> str:  # noqa: ARG002
        """What was held back and is the answer's own, once nothing follows; a call that is cut loses nothing."""
        return self._end()

    def _begin(self) -> None:
        if not self._arguments:
            self.calls.begin(self._parts["name"].strip(), self._parts["id"].strip())

    def _end(self) -> str:
        """The present call, if there is one, has no more; a part of its name is the answer's own."""
        part, self._part = self._part, "text"
        if part == "text":
            return ""
        if part == "name":
            return self._parts["name"]
        self._begin()
        self.is_complete = is_json("".join(self._arguments))
        self._arguments = []
        return ""


CallReader = ToolCallReader | SpelledCallReader | HermesCallReader | LlamaCallReader


def tool_call_reader(grammar: ToolCallGrammar) -> CallReader:
    """The one for that spelling."""
    match grammar.tokens.format:
        case "hermes":
            return HermesCallReader(grammar)
        case "llama3_json":
            return LlamaCallReader(grammar)
    return ToolCallReader(grammar) if grammar.tokens.args is None else SpelledCallReader(grammar)


def _whole_name(text: str, rest: str | None = None) -> str | None:
    """The name in the beginning of a call, if it is whole and, where it is given, `rest` is all that follows."""
    if not text.startswith(_NAME):
        return None
    try:
        name, end = json.JSONDecoder().raw_decode(text, len(_NAME))
    except (ValueError, RecursionError):
        return None
    return name if isinstance(name, str) and rest in (None, text[end:]) else None
