"""Spells pieces of grammars in EBNF, as xgrammar reads it. Knows its signs and escapes; knows no rules."""

from __future__ import annotations

from collections.abc import Iterable


def choice(options: Iterable[str]) -> str:
    """One of them."""
    return f"({' | '.join(options)})"


def repeat(body: str, low: int, high: int | None) -> str:
    """`low` to `high` times, or without end. `body` is one name, class or group."""
    if high == 0:
        return '""'
    return body if low == high == 1 else f"{body}{{{low},{'' if high is None else high}}}"


def literal(text: str) -> str:
    """The text itself."""
    return f'"{"".join(map(_escaped, text))}"'


def char_class(ranges: Iterable[tuple[int, int]]) -> str:
    """One character of these code points, both ends included."""
    return f"[{''.join(_code(low) + (f'-{_code(high)}' if high > low else '') for low, high in ranges)}]"


def _code(code: int) -> str:
    return _escaped(chr(code))


def _escaped(char: str) -> str:
    if char == " " or (char.isascii() and char.isalnum()):
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
