"""Which numbers a schema allows, as whole numbers of decimal places. Knows its words for numbers; spells nothing.

    {"minimum": 0.5, "maximum": 2}     1 to 2, 5 to 20 tenths, 50 to 200 hundredths, …

Arithmetic is decimal: 0.07 is a multiple of 0.01. Where there are places, numbers have at most 15 digits, so no two of
them are the same float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

NUMBER_WORDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})

_INTEGER_DIGITS = 18  # where a bound does not ask for more
_NUMBER_DIGITS = 15
_MAX_DIGITS = 40
_PLACES = 6  # after the point, where a bound does not ask for more
_MAX_REMAINDERS = 2000  # that a grammar would have to tell apart


@dataclass(frozen=True, slots=True)
class Range:
    """The multiples of `step` from `low` to `high`, written with a point before the last `places` digits."""

    places: int
    low: int
    high: int
    step: int


def number_ranges(schema: dict[str, Any], *, integer: bool) -> list[Range]:
    """What the schema allows, but for numbers of very many digits. Raises ValueError if it is nothing or too much."""
    words = {word: Fraction(Decimal(str(schema[word]))) for word in NUMBER_WORDS if word in schema}
    lowest = max((words[word] for word in ("minimum", "exclusiveMinimum") if word in words), default=None)
    highest = min((words[word] for word in ("maximum", "exclusiveMaximum") if word in words), default=None)
    least = _digits(max(0, lowest or 0, -(highest or 0)))  # of the smallest number, without a sign
    if least >= _MAX_DIGITS or any(word.denominator > 10**_MAX_DIGITS for word in words.values()):
        raise ValueError("a bound has too many digits")
    ranges = []
    for places in [0] if integer else _places(words):
        most = 10 ** (_NUMBER_DIGITS if places else max(_INTEGER_DIGITS, least + 1)) - 1
        low = max(-most, -most if lowest is None else math.ceil(lowest * 10**places))
        high = min(most, most if highest is None else math.floor(highest * 10**places))
        low += Fraction(low, 10**places) == words.get("exclusiveMinimum")
        high -= Fraction(high, 10**places) == words.get("exclusiveMaximum")
        step = (words.get("multipleOf", Fraction(1, 10**places)) * 10**places).numerator
        if -(-low // step) * step <= high:
            _refuse_many(low, high, step)
            ranges.append(Range(places, low, high, step))
    if not ranges:
        raise ValueError("no number satisfies it")
    return ranges


def _places(words: dict[str, Fraction]) -> range:
    if "multipleOf" in words:
        return range(_decimals(words["multipleOf"]) + 1)
    return range(min(_NUMBER_DIGITS, max([_PLACES, *(_decimals(word) + 1 for word in words.values())])) + 1)


def _decimals(value: Fraction) -> int:
    """How many digits it has after the point."""
    return next(places for places in range(_MAX_DIGITS + 1) if 10**places % value.denominator == 0)


def _digits(value: Fraction | int) -> int:
    return len(str(int(value)))


def _refuse_many(low: int, high: int, step: int) -> None:
    """A grammar tells remainders apart, for each number of digits that are still to come."""
    width = max(_digits(abs(low)), _digits(abs(high)))
    multiples = (high - low) // step + 1
    if sum(min(multiples, step // math.gcd(step, 10**rest)) for rest in range(width)) > _MAX_REMAINDERS:
        raise ValueError("'multipleOf' is too large for these bounds")
