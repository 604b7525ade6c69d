"""Spells patterns as regular expressions that xgrammar reads. Knows its classes and repeats; knows nothing of JSON."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from cluster.ebnf import choice, literal, repeat
from cluster.json_schema.patterns import Chars, Choice, Pattern, Ranges, Repeat, Sequence
from router_service.grammar.rules.rules import Rules

_UTF8_LENGTHS: Ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF))
_MAX_STATES = 32  # of one expression's characters, by number
_UNCOUNTED = ((0, None), (1, None), (0, 1))
_MAX_CHARACTERS = 100_000  # of a pattern with its counts written out


def pattern_rule(rules: Rules, pattern: Pattern, char: Callable[[Ranges], str]) -> str:
    """What all of the pattern matches; `char` spells one character. Raises ValueError if it is too large."""
    if _num_characters(pattern) > _MAX_CHARACTERS:
        raise ValueError("it is too large: counts within one another multiply")
    if isinstance(pattern, Repeat) and isinstance(pattern.body, Chars):
        return repeated(rules, char(pattern.body.ranges), pattern.low, pattern.high)
    return _rule(rules, pattern, char)


def repeated(rules: Rules, char: str, low: int, high: int | None) -> str:
    """Characters of one kind. Many are counted by xgrammar as they come, and an escape may end past the last of them.

    An expression with a state for each would take some seconds to compile, and one past 128 some more for each token.
    """
    if high is None or high <= _MAX_STATES:
        return _regex(rules, f"{char}{{{low},{'' if high is None else high}}}")
    return _regex(rules, f"{char}{{{low},}}", max_chars=high)


def class_of(ranges: Ranges) -> str:
    """One character as it is. Characters of different lengths in UTF-8 need a class each.

    Of one range across them xgrammar makes bytes that are no UTF-8.
    """
    classes = []
    for first, last in _UTF8_LENGTHS:
        parts = [(max(low, first), min(high, last)) for low, high in ranges if low <= last and high >= first]
        if parts:
            spans = (_in_class(low) + (f"-{_in_class(high)}" if high > low else "") for low, high in parts)
            classes.append(f"[{''.join(spans)}]")
    return classes[0] if len(classes) == 1 else f"({'|'.join(classes)})"


def _rule(rules: Rules, pattern: Pattern, char: Callable[[Ranges], str]) -> str:
    """One expression where that is safe, else rules that hold several together.

    xgrammar 0.2.8 mixes the states of an expression up: for it `(a{2,130})*` matches `a`, `((b{2,3})?)+` matches `b`,
    and `b|a|ba*` matches `aa`. So what is counted, and each option of a choice that repeats, is one of its own.
    """
    match pattern:
        case Repeat(body, low, high) if not _is_safe(body):
            return rules.add(repeat(_rule(rules, body, char), low, high))
        case Choice(options) if not _is_safe(pattern):
            return rules.add(choice(_rule(rules, option, char) for option in options))
        case Sequence(parts) if not _is_safe(pattern):
            runs = [(safe, tuple(run)) for safe, run in groupby(parts, _is_safe)]
            names = [_rule(rules, part, char) for safe, run in runs for part in ([Sequence(run)] if safe else run)]
            return rules.add(" ".join(names))
        case _:
            return _regex(rules, _spelled(pattern, char))


def _is_safe(pattern: Pattern) -> bool:
    """Whether it can stand in an expression with others."""
    match pattern:
        case Chars():
            return True
        case Sequence(parts):
            return all(map(_is_safe, parts))
        case Choice(options):
            return not any(map(_repeats, options))
        case Repeat(body, low, high):
            return (low, high) in _UNCOUNTED and _is_safe(body)


def _num_characters(pattern: Pattern) -> int:
    """With every count written out."""
    match pattern:
        case Chars():
            return 1
        case Sequence(inner) | Choice(inner):
            return sum(map(_num_characters, inner))
        case Repeat(body, low, high):
            return _num_characters(body) * max(1, low if high is None else high)


def _repeats(pattern: Pattern) -> bool:
    match pattern:
        case Chars():
            return False
        case Sequence(inner) | Choice(inner):
            return any(map(_repeats, inner))
        case Repeat():
            return True


def _spelled(pattern: Pattern, char: Callable[[Ranges], str]) -> str:
    match pattern:
        case Chars(ranges):
            return char(ranges)
        case Sequence(parts):
            return "".join(_spelled(part, char) for part in parts)
        case Choice(options):
            return f"({'|'.join(_spelled(option, char) for option in options)})"
        case Repeat(body, low, high):
            return f"({_spelled(body, char)}){{{low},{'' if high is None else high}}}"


def _regex(rules: Rules, regex: str, max_chars: int | None = None) -> str:
    return rules.add(f"Regex({literal(regex)})", max_chars=max_chars)


def _in_class(code: int) -> str:
    return f"\\{chr(code)}" if chr(code) in "\\]^-[" else chr(code)
