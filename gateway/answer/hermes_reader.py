"""Reads calls of tools that stand in tags, as Hermes' and Qwen's models write them. Knows no streams.

    I look.\n<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {…}}\n…

The tags are words, or special tokens where the vocabulary has such. What stands in them and is no call is the answer's
own text, tags and all; so is everything outside, but for blanks beside a call. A call needs no tag that ends it.
"""

from __future__ import annotations

from cluster.messages import CALL_TAGS, ToolCallGrammar
from gateway.answer.json_call import JsonCallReader, call_head, cut_name, whole_call
from gateway.answer.reasoning_reader import num_begun

BEGIN, END = CALL_TAGS


class HermesCallReader(JsonCallReader):
    """`push` each token and its text, then `flush`; `calls` has what was read."""

    def __init__(self, grammar: ToolCallGrammar) -> None:
        super().__init__("text")  # of which what is held may be a tag
        self._begin_id, self._end_id = grammar.tokens.calls, grammar.tokens.end
        self._blanks: str | None = ""  # before a text that has not begun; None: it has
        self._is_cut = False  # the last call's arguments
        self._looked_at: list[str] = []  # before what is held, and has no end tag: long calls are looked at once

    @property
    def is_complete(self) -> bool:
        """Whether no call is open."""
        return self._part in ("text", "rest", "keys") and not self._is_cut

    def push(self, token_id: int, text: str) -> str:
        """The part of `text` that is the answer's own."""
        own = self._read(text)
        if token_id >= 0 and token_id == self._begin_id:
            own += self._end()
            self._begin()
        elif token_id >= 0 and token_id == self._end_id:
            own += self._end()
        return own

    def flush(self, *, has_ended: bool) -> str:  # noqa: ARG002
        """What was held back and is the answer's own, once nothing follows; a call that is cut loses nothing."""
        if self._part == "text":
            held, self._held = self._held, ""
            own = self._own(held)
            return own if self.calls.num_calls else own + (self._blanks or "")
        if self._part == "head" and (name := cut_name(self._held)) is not None:
            self.calls.begin(name)
            return ""
        if self._part == "rest":
            after = self._held.removeprefix("}").lstrip()
            return "" if END.startswith(after) else after
        if self._part == "keys":
            return self._all_held()
        return self._end(is_whole=False)

    def _read_part(self, text: str) -> tuple[str, str]:
        match self._part:
            case "text":
                return self._read_text(text)
            case "head":
                return self._read_head(text)
            case "rest":
                return self._read_rest(text)
        return self._to_end_tag(text)

    def _read_text(self, text: str) -> tuple[str, str]:
        if self._begin_id is not None:
            return self._own(text), ""
        before, begin, rest = (self._held + text).partition(BEGIN)
        if begin:
            own = self._own(before)
            self._begin()
            return own, rest
        num_held = num_begun(BEGIN, before)
        self._held = before[len(before) - num_held :]
        return self._own(before[: len(before) - num_held]), ""

    def _read_head(self, text: str) -> tuple[str, str]:
        self._held += text
        head = call_head(self._held)
        if head == "part":
            return "", ""
        held, self._held = self._held, ""
        if head is None:
            self._part = "other"
            return "", held
        return self._begin_arguments(head, held)

    def _read_rest(self, text: str) -> tuple[str, str]:
        """After the arguments: a bracket and the tag, or more keys that nobody asked for; what else follows is text."""
        self._held = (self._held + text).lstrip()
        if not self._held:
            return "", ""
        if self._held.startswith(","):
            held, self._held, self._part = self._held, "", "keys"
            return self._to_end_tag(held)
        after = self._held.removeprefix("}").lstrip()
        if self._end_id is None and len(after) < len(END) and END.startswith(after):
            self._held = "}" * self._held.startswith("}") + after
            return "", ""
        self._held = ""
        self._over()
        return "", after.removeprefix(END) if self._end_id is None else after

    def _to_end_tag(self, text: str) -> tuple[str, str]:
        """What is held is looked at for the tag once, but for its end, where one may have begun."""
        held = self._held + text
        if self._end_id is not None:
            self._looked_at.append(held)
            self._held = ""
            return "", ""
        inside, end, rest = held.partition(END)
        if end:
            self._held = inside
            return self._end(), rest
        looked_at = max(0, len(held) - len(END) + 1)
        self._looked_at.append(held[:looked_at])
        self._held = held[looked_at:]
        return "", ""

    def _all_held(self) -> str:
        held = "".join(self._looked_at) + self._held
        self._looked_at, self._held = [], ""
        return held

    def _begin(self) -> None:
        self._part, self._held, self._blanks = "head", "", ""

    def _end(self, *, is_whole: bool = True) -> str:
        """What is in the tags has no more."""
        part, held = self._part, self._all_held()
        if part == "text":
            return ""
        self._is_cut = part == "arguments"
        self._over()
        if part not in ("head", "other"):
            return ""
        call = whole_call(held)
        if call is None:
            tags = ("", "") if self._begin_id is not None else (BEGIN, END if is_whole else "")
            return self._own(held.join(tags))
        name, arguments = call
        self.calls.begin(name)
        self.calls.add(arguments)
        return ""

    def _over(self) -> None:
        self._part, self._blanks = "text", ""

    def _own(self, text: str) -> str:
        """The same, once it says something: blanks alone may be a call's."""
        if self._blanks is None:
            return text
        if not text.strip():  # not of all blanks so far, which may be many
            self._blanks += text
            return ""
        text = self._blanks + text
        self._blanks = None
        return text
