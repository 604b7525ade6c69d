"""Bounds of a JSON text, checked before it is parsed: a parser lets no other thread run before it is done. Knows bytes.

What is bounded is what parsing costs, about as much at either bound: a number in a list takes some 50 ns, all else up
to a microsecond. Text inside of strings costs nothing. Large texts are looked at in slices, so that this takes no long
turn either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest

MAX_DEPTH = 64  # objects and lists within each other
MAX_VALUES = 2**19  # entries of lists and objects; a prompt may be token ids
MAX_PARTS = 2**16  # objects, lists, members, strings, fractions and words, which are all but whole numbers
MAX_DIGITS = 308  # of a number; an integer's cost grows with the square of it

SLICE_BYTES = 2**18

Bytes = npt.NDArray[np.uint8]

_QUOTE, _BACKSLASH, _ZERO = b'"\\0'
_STEP = np.zeros(256, np.int8)  # what each byte adds to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_PARTS = list(b"[{:.eE")  # each begins one or is in one; strings are counted by their quotes
_VALUES = list(b",[{")


def check_bounds(data: bytes) -> None:
    """Raises InvalidRequest for JSON that is deeper or larger than the bounds; what is no JSON may pass or not."""
    if len(data) <= MAX_PARTS and data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    scan = _Scan()
    for start in range(0, len(data), SLICE_BYTES):
        scan.read(np.frombuffer(data, np.uint8, min(SLICE_BYTES, len(data) - start), start))


class _Scan:
    """What was seen of a text that is read slice by slice."""

    def __init__(self) -> None:
        self._backslashes = 0  # that the last slice ended in
        self._in_string = 0  # 1: it ended in one
        self._depth = 0
        self._digits = 0  # that it ended in
        self._num_values = 0
        self._num_quotes = 0
        self._num_others = 0

    def read(self, text: Bytes) -> None:
        """Raises InvalidRequest as soon as a bound is passed."""
        quotes = self._quotes(text)
        is_quote = np.zeros(len(text), np.uint8)
        is_quote[quotes] = 1
        inside = (np.cumsum(is_quote, dtype=np.uint8) + self._in_string) & 1
        self._in_string = int(inside[-1])
        plain = text[inside == 0]  # and the quotes that end strings
        counts = np.bincount(plain, minlength=256)
        self._num_quotes += len(quotes)
        self._num_values += int(counts[_VALUES].sum())
        self._num_others += int(counts[_PARTS].sum())
        if self._num_values > MAX_VALUES:
            raise InvalidRequest(f"the body has more than {MAX_VALUES} values")
        if self._num_others + self._num_quotes // 2 > MAX_PARTS:
            raise InvalidRequest(f"the body has more than {MAX_PARTS} objects, lists, members and strings in all")
        if len(plain):
            self._check_depth(plain)
            self._check_digits(plain)

    def _quotes(self, text: Bytes) -> npt.NDArray[np.intp]:
        """Where strings begin and end: quotes behind an even number of backslashes."""
        quotes = np.flatnonzero(text == _QUOTE)
        is_backslash = text == _BACKSLASH
        before, self._backslashes = self._backslashes, 0
        if not before and not is_backslash.any():
            return quotes
        places = np.arange(len(text))
        other = np.maximum.accumulate(np.where(is_backslash, -1 - before, places))  # the last that is no backslash
        self._backslashes = int(places[-1] - other[-1])
        num_backslashes = quotes - 1 - np.where(quotes > 0, other[quotes - 1], -1 - before)
        unescaped: npt.NDArray[np.intp] = quotes[num_backslashes % 2 == 0]
        return unescaped

    def _check_depth(self, plain: Bytes) -> None:
        depths = self._depth + np.cumsum(_STEP[plain], dtype=np.int32)
        self._depth = int(depths[-1])
        if int(depths.max()) > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")

    def _check_digits(self, plain: Bytes) -> None:
        others = np.flatnonzero(plain - _ZERO > 9)  # unsigned: what is below '0' wraps around
        ends = np.concatenate(([-1 - self._digits], others, [len(plain)]))
        lengths = np.diff(ends) - 1
        self._digits = int(lengths[-1])
        if int(lengths.max()) > MAX_DIGITS:
            raise InvalidRequest(f"the body has a number of more than {MAX_DIGITS} digits")
