"""Calls of tools, and the pieces that they come in. Knows no spelling and no streams."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, replace

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call, or a piece of one: only the first piece has an id and a name."""

    index: int  # among the calls of its choice
    id: str  # 9 letters and digits, as Mistral's
    name: str
    arguments: str  # JSON, as the model wrote it; no JSON where `max_tokens` cut it


def new_call_id() -> str:
    """At random."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def joined(pieces: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """The pieces of each call as one."""
    first: dict[int, ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        first.setdefault(piece.index, piece)
        arguments.setdefault(piece.index, []).append(piece.arguments)
    return tuple(replace(call, arguments="".join(arguments[i])) for i, call in first.items())


class Calls:
    """The calls of one answer, and the pieces of them that were not taken yet."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._pieces: list[ToolCall] = []
        self._ids: set[str] = set()

    def begin(self, name: str, call_id: str = "") -> None:
        """A call whose id is that one, if it is one and no other's."""
        is_id = len(call_id) == 9 and all(char in _ALPHABET for char in call_id) and call_id not in self._ids
        self._ids.add(call_id if is_id else (call_id := new_call_id()))
        self._pieces.append(ToolCall(self.num_calls, call_id, name, ""))
        self.num_calls += 1

    def add(self, arguments: str) -> None:
        """More of the last one's arguments."""
        self._pieces.append(ToolCall(self.num_calls - 1, "", "", arguments))

    def take(self) -> tuple[ToolCall, ...]:
        """What is new since the last time, a piece for each call."""
        pieces, self._pieces = self._pieces, []
        return joined(pieces)
