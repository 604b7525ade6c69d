"""Spells ranges of numbers as rules, digit by digit. Knows decimal notation; knows no schema.

5 to 20      "5" … "9"  |  "1" [0-9]  |  "20"
"""

from __future__ import annotations

from cluster.ebnf import choice
from cluster.json_schema.numbers import Range
from router_service.grammar.rules.rules import Rules

ANY_INTEGER = '"-"? ("0" | [1-9] [0-9]{0,17})'
ANY_NUMBER = f'{ANY_INTEGER} ("." [0-9]{{1,17}})? ([eE] [+\\-]? [0-9]{{1,2}})?'


def numbers(rules: Rules, ranges: list[Range]) -> str:
    """A number of one of the ranges."""
    options: list[str] = []
    for one in ranges:
        digits = _Digits(rules, one.places, one.step)
        if one.high >= 0:
            options += digits.between(max(one.low, 0), one.high)
        if one.low < 0:
            options += [f'"-" {option}' for option in digits.between(max(1, -one.high), -one.low)]
    return choice(options)


class _Digits:
    """Strings of digits with a point before the last `places`, whose value is a multiple of `step`."""

    def __init__(self, rules: Rules, places: int, step: int) -> None:
        self._rules = rules
        self._places = places
        self._step = step
        self._known: dict[tuple[int, int, int, int], str] = {}

    def between(self, low: int, high: int) -> list[str]:
        """One expression for every number of digits."""
        options = []
        for width in range(self._places + 1, max(len(str(high)), self._places + 1) + 1):
            least = 10 ** (width - 1) if width > self._places + 1 else 0  # no zeros in front
            first, last = max(low, least), min(high, 10**width - 1)
            if self._is_any(first, last, 0):
                options.append(self._rest(width, first, last, 0))
        return options

    def _rest(self, width: int, low: int, high: int, remainder: int) -> str:
        """`width` digits of a value from `low` to `high`; `remainder` is what the digits before leave."""
        if width == 0:
            return '""'
        if self._step == 1 and low == 0 and high == 10**width - 1:
            point = self._places if width >= self._places > 0 else 0
            whole = f"[0-9]{{{width - point}}} " if width > point else ""
            return f'{whole}"." [0-9]{{{point}}}' if point else whole.strip()
        key = (width, low, high, remainder)
        if key not in self._known:
            digits: dict[str, str] = {}  # by what follows them
            unit = 10 ** (width - 1)
            for digit in range(low // unit, high // unit + 1):
                first, last = max(low - digit * unit, 0), min(high - digit * unit, unit - 1)
                left = (remainder + digit * unit) % self._step
                if self._is_any(first, last, left):
                    rest = self._rest(width - 1, first, last, left)
                    digits[rest] = digits.get(rest, "") + str(digit)
            dot = '"." ' if width == self._places else ""
            self._known[key] = self._rules.add(choice(f"{dot}[{each}] {rest}" for rest, each in digits.items()))
        return self._known[key]

    def _is_any(self, low: int, high: int, remainder: int) -> bool:
        """Whether a value between them makes a multiple of the step."""
        return low <= high and low + (-remainder - low) % self._step <= high
