"""Reads calls of tools that are all of an answer, as Llama 3's models write them. Knows no streams.

    {"name": "f", "parameters": {…}}; {"name": "g", "parameters": {…}}

The token `<|python_tag|>` before them says nothing more. JSON that calls none of the tools is text, as is all that
follows it.
"""

from __future__ import annotations

from cluster.messages import ToolCallGrammar
from gateway.answer.json_call import JsonCallReader, call_head, cut_name

_BETWEEN = " \n\t;"


class LlamaCallReader(JsonCallReader):
    """`push` each token and its text, then `flush`; `calls` has what was read."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        super().__init__("head")
        self._names = {name for name, _ in grammar.tools}

    @property
    def is_complete(self) -> bool:
        """Whether no call is open."""
        return self._part != "arguments" and not self._held.strip()

    def push(self, token_id: int, text: str) -> str:  # noqa: ARG002
        """The part of `text` that is the answer's own."""
        return self._read(text)

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

    def _read_part(self, text: str) -> tuple[str, str]:
        match self._part:
            case "head":
                return self._read_head(text)
            case "rest":
                return self._read_rest(text)
        return text, ""

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
        return self._begin_arguments(head, held)

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
