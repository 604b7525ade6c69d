"""Reads calls of tools that are all of an answer, as Llama 3's models write them. Knows no streams.

    {"name": "f", "parameters": {…}}; {"name": "g", "parameters": {…}}

The token `<|python_tag|>` before them says nothing more. JSON that calls none of the tools is text, as is all that
follows it.
"""

from __future__ import annotations

from typing import Literal

from cluster.messages import ToolCallGrammar
from gateway.answer.calls import Calls
from gateway.answer.json_call import JsonObject, call_head, cut_name

_BETWEEN = " \n\t;"


class LlamaCallReader:
    """`push` each token and its text, then `flush`; `calls` has what was read."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        self.calls = Calls()
        self._names = {name for name, _ in grammar.tools}
        self._part: Literal["head", "arguments", "rest", "text"] = "head"
        self._held = ""
        self._arguments = JsonObject()

    @property
    def is_complete(self) -> bool:
        """Whether no call is open."""
        return self._part != "arguments" and not self._held.strip()

    def push(self, token_id: int, text: str) -> str:  # noqa: ARG002
        """The part of `text` that is the answer's own."""
        own = ""
        while text:
            match self._part:
                case "text":
                    return own + text
                case "head":
                    said, text = self._read_head(text)
                case "arguments":
                    said, text = self._read_arguments(text)
                case "rest":
                    said, text = self._read_rest(text)
            own += said
        return own

    def flush(self, *, has_ended: bool) -> str:
        """What was held back and is the answer's own, once nothing follows; a call that is cut loses nothing."""
        if self._part != "head":
            return ""
        name = cut_name(self._between())
        if not has_ended and name in self._names:
            self.calls.begin(name)
            return ""
        held, self._held = self._held, ""
        return "" if self.calls.num_calls and not held.strip(_BETWEEN) else held

    def _between(self) -> str:
        """What is held without what stands between two calls."""
        return self._held.lstrip(_BETWEEN) if self.calls.num_calls else self._held

    def _read_head(self, text: str) -> tuple[str, str]:
        self._held += text
        held = self._between()
        head = call_head(held)
        if head == "part":
            return "", ""
        if head is None or head.name not in self._names:
            return self._text()
        self.calls.begin(head.name)
        self._part, self._held, self._arguments = "arguments", "", JsonObject()
        return "", held[head.end :]

    def _read_arguments(self, text: str) -> tuple[str, str]:
        arguments, rest = self._arguments.push(text)
        self.calls.add(arguments)
        if self._arguments.is_over:
            self._part = "rest"
        return "", rest

    def _read_rest(self, text: str) -> tuple[str, str]:
        """The bracket that ends the call."""
        self._held += text
        after = self._held.lstrip()
        if not after:
            return "", ""
        if after.startswith("}"):
            self._part, self._held = "head", ""
            return "", after[1:]
        return self._text()

    def _text(self) -> tuple[str, str]:
        held, self._held, self._part = self._held, "", "text"
        return held, ""
