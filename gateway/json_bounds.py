"""Bounds of a JSON text, checked before it is parsed: a parser lets no other thread run before it is done. Knows bytes.

What is bounded is what parsing costs, about as much at either bound: a number in a list takes some 50 ns, all else up
to a microsecond. Text inside of strings costs nothing.
"""

from __future__ import annotations

import numpy as np

from cluster.errors import InvalidRequest

MAX_DEPTH = 64  # objects and lists within each other
MAX_VALUES = 2**19  # entries of lists and objects; a prompt may be token ids
MAX_PARTS = 2**16  # objects, lists, members, strings, fractions and words, which are all but whole numbers

_STEP = np.zeros(256, np.int8)  # what each byte adds to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_NO_STEPS = bytes(np.flatnonzero(_STEP == 0).astype(np.uint8))
_PARTS = tuple(b"[{:.eE")  # each begins one or is in one; strings are counted by their quotes
_VALUES = tuple(b",[{")


def check_bounds(data: bytes, what: str = "the body") -> None:
    """Raises InvalidRequest for JSON that is deeper or larger than the bounds; what is no JSON may pass or not."""
    if len(data) <= MAX_PARTS and data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    text = data.replace(rb"\\", b"").replace(rb"\"", b"")  # now every quote begins or ends a string
    num_strings = text.count(b'"') // 2
    _check_parts(num_strings, what)
    plain = b"".join(text.split(b'"')[::2])  # what is outside of strings
    if sum(map(plain.count, _VALUES)) > MAX_VALUES:
        raise InvalidRequest(f"{what} has more than {MAX_VALUES} values")
    _check_parts(num_strings + sum(map(plain.count, _PARTS)), what)
    steps = np.frombuffer(b"[" + plain.translate(None, _NO_STEPS), np.uint8)
    if np.cumsum(_STEP[steps], dtype=np.int32).max() > MAX_DEPTH + 1:
        raise InvalidRequest(f"{what} is nested deeper than {MAX_DEPTH} levels")


def _check_parts(num_parts: int, what: str) -> None:
    if num_parts > MAX_PARTS:
        raise InvalidRequest(f"{what} has more than {MAX_PARTS} objects, lists, members and strings in all")
