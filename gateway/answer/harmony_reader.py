"""Reads the messages of gpt-oss's format, harmony: reasoning, text, and calls of tools. Knows no streams.

    <|channel|>analysis<|message|>Paris?<|end|><|start|>assistant<|channel|>final<|message|>It rains.<|return|>
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

The marks are special tokens, so nothing that a model writes as text is one. The library `openai-harmony` is of no use:
it reads ids of a vocabulary that it downloads, and a model of this shape may have another.
"""

from __future__ import annotations

import re
from dataclasses import astuple
from typing import Literal

from cluster.messages import HarmonyTokens
from gateway.answer.calls import Calls
from gateway.answer.json_call import is_json
from gateway.answer.reasoning_reader import Split

_MAX_HEADER = 256  # characters before a message; more is text
_HEADER = re.compile(r"\s*(?:t|to|to=\S*)?\s*")  # what may stand before a channel, where the prompt named the role
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([a-zA-Z0-9_.-]+)")


class HarmonyCalls:
    """The calls among an answer's messages: what `gateway.answer.tools_reader` has for other formats."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.is_complete = True  # every call that is over
        self._arguments: list[str] = []

    def begin(self, name: str) -> None:
        """A call's message."""
        self.end()
        self.calls.begin(name)
        self._arguments = [""]

    def add(self, arguments: str) -> None:
        """More of it."""
        if arguments:
            self._arguments.append(arguments)
            self.calls.add(arguments)

    def end(self) -> None:
        """It has no more."""
        if self._arguments:
            self.is_complete = is_json("".join(self._arguments))
            self._arguments = []

    def push(self, token_id: int, text: str) -> str:  # noqa: ARG002
        """What of the text of other messages is the answer's own: all of it."""
        return text

    def flush(self, *, has_ended: bool) -> str:  # noqa: ARG002
        """Nothing was held back."""
        self.end()
        return ""


class HarmonyReader:
    """`push` each token and its text, then `flush`; `tool_calls` has what was called."""

    def __init__(self, tokens: HarmonyTokens, tools: frozenset[str], *, in_answer: bool = False) -> None:
        """`tools`: names of those that may be called. `in_answer`: the prompt has begun the message of the answer."""
        self.num_tokens = 0  # of the reasoning and its marks
        self.tool_calls = HarmonyCalls()
        self._tokens = tokens
        self._marks = frozenset(astuple(tokens))
        self._tools = tools
        self._part: Literal["header", "reasoning", "answer", "call"] = "answer" if in_answer else "header"
        self._header = ""
        self._is_marked = False  # the header has a mark, so that its text is none of the answer's
        self._num_undecided = 0  # tokens of the header
        self._begun: set[str] = set()  # kinds of messages that have had text
        self._separator = ""  # before the next text of the present message: one message's is a line of its own

    @property
    def is_over(self) -> bool:
        """Whether what comes is the answer's text."""
        return self._part == "answer"

    def is_tag(self, token_id: int) -> bool:
        """Whether the token is a mark, so that the text before it is complete."""
        return token_id in self._marks

    def push(self, token_id: int, text: str) -> Split:
        """The parts of `text`, as far as they are decided. A mark comes after its text; -1 is no token."""
        was = self._part
        split = self._read(text)
        if token_id in self._marks:
            self._mark(token_id)
        if token_id >= 0:
            if was == "header":
                self._num_undecided += 1
            elif was == "reasoning":
                self.num_tokens += 1
            if self._part == "reasoning":
                self.num_tokens += self._num_undecided
            if self._part != "header":
                self._num_undecided = 0
        return split

    def flush(self) -> Split:
        """What was held back, once nothing follows: a header that is cut says nothing."""
        held, self._header = ("", "") if self._is_marked else (self._header, "")
        return Split("", "" if _HEADER.fullmatch(held) and held.strip() else held)

    def _read(self, text: str) -> Split:
        match self._part:
            case "header":
                return self._read_header(text)
            case "call":
                self.tool_calls.add(text)
                return Split("", "")
            case "reasoning":
                return Split(self._line(text), "")
            case "answer":
                return Split("", self._line(text))

    def _read_header(self, text: str) -> Split:
        self._header += text
        is_header = len(self._header) <= _MAX_HEADER if self._is_marked else _HEADER.fullmatch(self._header)
        if is_header:
            return Split("", "")
        held, self._header = self._header, ""
        self._begin("answer")
        return Split("", self._line(held))

    def _mark(self, token_id: int) -> None:
        tokens = self._tokens
        if token_id == tokens.message and self._part == "header":
            self._begin_message()
        elif token_id in (tokens.channel, tokens.constrain) and self._part == "header":
            self._header += " <channel> " if token_id == tokens.channel else " "
            self._is_marked = True
        elif token_id in (tokens.start, tokens.channel, tokens.end, tokens.call):
            self.tool_calls.end()
            self._part, self._is_marked = "header", True
            self._header = " <channel> " if token_id == tokens.channel else ""

    def _begin_message(self) -> None:
        header, self._header = self._header, ""
        recipient = _RECIPIENT.search(header)
        channel = header.partition("<channel>")[2].split()[:1]
        if recipient is not None and recipient[1] in self._tools:
            self._part = "call"
            self.tool_calls.begin(recipient[1])
        elif channel == ["analysis"] and recipient is None:
            self._begin("reasoning")
        else:
            self._begin("answer")

    def _begin(self, part: Literal["reasoning", "answer"]) -> None:
        self._part = part
        self._separator = "\n" if part in self._begun else ""

    def _line(self, text: str) -> str:
        if text:
            self._begun.add(self._part)
            text, self._separator = self._separator + text, ""
        return text
