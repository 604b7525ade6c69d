"""Calls as JSON objects: where a name is, and where its arguments end. Knows JSON; knows no tags and no tokens.

{"name": "f", "arguments": {…}}          Hermes, Qwen
{"name": "f", "parameters": {…}}         Llama 3, also with "type": "function" before the name
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from gateway.answer.calls import Calls

Part = Literal["text", "head", "arguments", "rest", "keys", "other"]  # keys: more than a call has
_MAX_HEAD = 1024  # characters before the arguments; a longer one is no call


class Head(NamedTuple):
    """What a call begins with."""

    name: str
    end: int  # where its arguments begin


def call_head(text: str) -> Head | Literal["part"] | None:
    """The head that a text begins with; `part`: it may become one; None: it is something else."""
    found = _HEAD.match(text)
    if found is not None:
        name = _string(found[1])
        return None if name is None else Head(name, found.end())
    return "part" if len(text) <= _MAX_HEAD and _PART.fullmatch(text) else None


def cut_name(text: str) -> str | None:
    """The name in the part of a head, if it is whole."""
    found = _NAME.match(text)
    return None if found is None else _string(found[1])


def is_json(text: str) -> bool:
    """Whether it is one value, whole."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose keys stand in another order, say; arguments may be JSON in a string."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    try:
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str) or not isinstance(json.loads(arguments), dict):
            return None
        (name + arguments).encode()
    except (ValueError, RecursionError):  # a lone surrogate, too
        return None
    return name, arguments


class Brackets:
    """How deep in brackets of JSON a text is, character by character. Those in strings are none."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._escaped = False

    def closed_by(self, char: str) -> bool:
        """Whether this one, the next, closes one."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "[{":
            self.depth += 1
        elif char in "]}":
            self.depth -= 1
            return True
        return False


class JsonObject:
    """Follows an object through the pieces of a text, to its last bracket."""

    def __init__(self) -> None:
        self.is_over = False
        self._brackets = Brackets()

    def push(self, text: str) -> tuple[str, str]:
        """What of a text belongs to the object, and what comes after it."""
        for i, char in enumerate(text):
            if self._brackets.closed_by(char) and self._brackets.depth == 0:
                self.is_over = True
                return text[: i + 1], text[i + 1 :]
        return text, ""


class JsonCallReader(ABC):
    """Reads an answer part by part, of which the arguments are read alike however a call is spelled."""

    def __init__(self, part: Part) -> None:
        self.calls = Calls()
        self._part: Part = part
        self._held = ""  # what is not decided of the part that it is in
        self._arguments = JsonObject()

    def _read(self, text: str) -> str:
        """The part of `text` that is the answer's own."""
        own = ""
        while text:
            said, text = self._read_arguments(text) if self._part == "arguments" else self._read_part(text)
            own += said
        return own

    @abstractmethod
    def _read_part(self, text: str) -> tuple[str, str]:
        """What is the answer's own, and what the next part has to read."""

    def _begin_arguments(self, head: Head, text: str) -> tuple[str, str]:
        """Of the call that a text begins with."""
        self.calls.begin(head.name)
        self._part, self._held, self._arguments = "arguments", "", JsonObject()
        return "", text[head.end :]

    def _read_arguments(self, text: str) -> tuple[str, str]:
        arguments, rest = self._arguments.push(text)
        self.calls.add(arguments)
        if self._arguments.is_over:
            self._part = "rest"
        return "", rest


def _string(text: str) -> str | None:
    try:
        value: str = json.loads(text)
        value.encode()
    except ValueError:  # a lone surrogate, too
        return None
    return value


_STRING = r'"(?:[^"\\]|\\.)*"'
_BEGIN = r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*'
_HEAD = re.compile(_BEGIN + f"({_STRING})" + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)
_NAME = re.compile(_BEGIN + f"({_STRING})", re.DOTALL)


def _part_of(word: str, rest: str) -> str:
    """An expression for every beginning of a word and, once it is whole, of what follows it and blanks."""
    expression = r"\s*" + rest
    for char in reversed(word):
        expression = f"(?:{re.escape(char)}{expression})?"
    return expression


def _part() -> str:
    ends = "|".join(_part_of(f'"{key}"', _part_of(":", _part_of("{", ""))) for key in ("arguments", "parameters"))
    name = r'(?:"(?:[^"\\]|\\.)*(?:"\s*' + _part_of(",", f"(?:{ends})") + r"|\\)?)?"
    named = _part_of('"name"', _part_of(":", name))
    typed = _part_of('"type"', _part_of(":", _part_of('"function"', _part_of(",", named))))
    return r"\s*" + _part_of("{", f"(?:{named}|{typed})")


_PART = re.compile(_part(), re.DOTALL)
