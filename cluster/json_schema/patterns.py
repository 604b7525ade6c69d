r"""Reads the regular expressions of schemas into trees. Knows the part of ECMA 262's syntax that a grammar can enforce.

A pattern is of the whole text here, so `^` and `$` stand at its ends only. `\d`, `\w` and `\s` are ASCII's: a text that
matches does so for ECMA's, Python's and Rust's engines alike, which differ beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included

_MAX_GROUPS = 40  # within one another
_MAX_COUNT = 100_000
_NON_ASCII: Ranges = ((0x80, 0x10FFFF),)
_SURROGATES: Ranges = ((0xD800, 0xDFFF),)
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = (*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_CLASSES: dict[str, tuple[Ranges, Ranges]] = {  # what every engine takes for one, and what any does
    "d": (_DIGITS, _DIGITS + _NON_ASCII),
    "w": (_WORD, _WORD + _NON_ASCII),
    "s": (((0x09, 0x0D), (0x20, 0x20)), ((0x09, 0x0D), (0x1C, 0x20), *_NON_ASCII)),
}
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of them."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times; without `high` as often as one likes."""

    body: Pattern
    low: int
    high: int | None


Pattern = Chars | Sequence | Choice | Repeat


def parse_pattern(text: str) -> Pattern:
    """Raises ValueError with what cannot be enforced."""
    return _Parser(text).pattern()


def of_length(pattern: Pattern, low: int, high: int | None) -> Pattern:
    """The pattern for texts of `low` to `high` characters. Raises ValueError where that needs more than counting."""
    while isinstance(pattern, Sequence | Choice):
        inner = pattern.parts if isinstance(pattern, Sequence) else pattern.options
        if len(inner) != 1:
            break
        pattern = inner[0]
    if isinstance(pattern, Repeat) and isinstance(pattern.body, Chars):
        low = max(low, pattern.low)
        high = min((end for end in (high, pattern.high) if end is not None), default=None)
        if high is not None and high < low:
            raise ValueError("no text of these lengths matches the pattern")
        return Repeat(pattern.body, low, high)
    shortest, longest = _width(pattern)
    if shortest < low or (high is not None and longest > high):
        raise ValueError("a length and a 'pattern' that does not imply it are not supported in one schema")
    return pattern


def literal_prefix(text: str) -> str:
    """What every text in which the pattern is found begins with: of `^x-` it is `x-`. Empty if unknown."""
    pattern = parse_pattern(text)
    prefix = ""
    if text.startswith("^") and isinstance(pattern, Sequence):
        for part in pattern.parts:
            if not isinstance(part, Chars) or len(part.ranges) != 1 or part.ranges[0][0] != part.ranges[0][1]:
                break
            prefix += chr(part.ranges[0][0])
    return prefix


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    """The characters of the one that are not in the other, in order."""
    kept = []
    gaps = sorted(removed)
    for first, last in sorted(ranges):
        for low, high in gaps:
            if low > last:
                break
            if low > first:
                kept.append((first, low - 1))
            first = max(first, high + 1)
        if first <= last:
            kept.append((first, last))
    return tuple(kept)


def _width(pattern: Pattern) -> tuple[float, float]:
    """How many characters at least and at most."""
    match pattern:
        case Chars():
            return 1, 1
        case Repeat(body, low, high):
            shortest, longest = _width(body)
            return shortest * low, 0 if longest == 0 else longest * (float("inf") if high is None else high)
        case Sequence(parts):
            widths = [_width(part) for part in parts]
            return sum(width[0] for width in widths), sum(width[1] for width in widths)
        case Choice(options):
            widths = [_width(option) for option in options]
            return min(width[0] for width in widths), max(width[1] for width in widths)


class _Parser:
    """One pass from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def pattern(self) -> Pattern:
        options = self._options(0)
        if self._at < len(self._text):
            raise ValueError("a ')' that closes nothing")
        return options

    def _options(self, depth: int) -> Pattern:
        if depth > _MAX_GROUPS:
            raise ValueError(f"groups deeper than {_MAX_GROUPS} are not supported")
        options = [self._sequence(depth)]
        while self._take("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, depth: int) -> Sequence:
        parts: list[Pattern] = []
        if depth == 0:
            self._take("^")
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if depth == 0 and self._text[self._at] == "$" and self._text[self._at + 1 : self._at + 2] in ("", "|"):
                self._at += 1
                break
            parts.append(self._repeated(self._atom(depth)))
        return Sequence(tuple(parts))

    def _atom(self, depth: int) -> Pattern:
        char = self._next()
        if char == "(":
            if self._take("?") and not self._take(":"):
                raise ValueError("only plain groups are supported, '(…)' and '(?:…)'")
            inside = self._options(depth + 1)
            if not self._take(")"):
                raise ValueError("a group without its ')'")
            return inside
        if char == "[":
            return self._class()
        if char == ".":
            return self._chars(without(((0, 0x10FFFF),), _LINE_ENDS))
        if char == "\\":
            return self._chars(self._escape(anything=False))
        if char in "^$":
            raise ValueError(f"{char!r} is supported at the ends of a pattern only")
        if char in "*+?{":
            raise ValueError(f"a {char!r} that repeats nothing")
        return self._chars(((ord(char), ord(char)),))

    def _repeated(self, atom: Pattern) -> Pattern:
        low, high = self._counts()
        if (low, high) == (1, 1):
            return atom
        self._take("?")  # lazy or not, the texts are the same
        if self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
            raise ValueError("a repetition of a repetition needs a group")
        return Repeat(atom, low, high)

    def _counts(self) -> tuple[int, int | None]:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        if not self._take("{"):
            return 1, 1
        end = self._text.find("}", self._at)
        first, comma, last = self._text[self._at : max(end, self._at)].partition(",")
        if not (first.isdecimal() and first.isascii() and (not last or (last.isdecimal() and last.isascii()))):
            raise ValueError("expected '{n}', '{n,}' or '{n,m}'")
        self._at = end + 1
        if max(len(first), len(last)) > 6 or max(int(first), int(last or 0)) > _MAX_COUNT:
            raise ValueError(f"at most {_MAX_COUNT} repetitions are supported")
        low, high = int(first), int(last) if last else None if comma else int(first)
        if high is not None and high < low:
            raise ValueError("a repetition of more than its most")
        return low, high

    def _class(self) -> Chars:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        if self._text[self._at : self._at + 1] == "]":
            raise ValueError("']' first in a class is not supported; write '\\]'")
        while not self._take("]"):
            first = self._member(negated)
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._member(negated)
                if not (len(first) == len(last) == 1 and first[0][0] == first[0][1] <= last[0][0] == last[0][1]):
                    raise ValueError("a range of characters that is none")
                first = ((first[0][0], last[0][0]),)
            ranges += first
        return self._chars(without(((0, 0x10FFFF),), tuple(ranges)) if negated else tuple(ranges))

    def _member(self, negated: bool) -> Ranges:
        char = self._next()
        return self._escape(anything=negated) if char == "\\" else ((ord(char), ord(char)),)

    def _escape(self, *, anything: bool) -> Ranges:
        """What is after a backslash; with `anything` all that any engine takes for it."""
        char = self._next()
        if char.lower() in _CLASSES:
            every, some = _CLASSES[char.lower()]
            if char.islower():
                return some if anything else every
            return without(((0, 0x10FFFF),), every if anything else some)
        if char in _CONTROLS:
            if char == "0" and self._text[self._at : self._at + 1].isdecimal():
                raise ValueError("octal escapes are not supported")
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if char in "xu":
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            self._at += len(digits)
            if len(digits) != (2 if char == "x" else 4) or not all(
                digit in "0123456789abcdefABCDEF" for digit in digits
            ):
                raise ValueError(f"'\\{char}' without its digits")
            return ((int(digits, 16), int(digits, 16)),)
        if char.isalnum():
            raise ValueError(f"'\\{char}' is not supported")
        return ((ord(char), ord(char)),)

    def _chars(self, ranges: Ranges) -> Chars:
        ranges = without(ranges, _SURROGATES)
        if not ranges:
            raise ValueError("a set of characters that is empty")
        return Chars(ranges)

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise ValueError("it ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, char: str) -> bool:
        found = self._text.startswith(char, self._at)
        self._at += found
        return found
