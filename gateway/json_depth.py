"""How deeply JSON is nested, found before it is parsed: a parser recurses before it can be asked. Knows bytes."""

from __future__ import annotations

import re

import numpy as np

# A string, or what has begun as one. Every alternative consumes, so the search is linear whatever the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)
_STEP = np.zeros(256, np.int8)  # what each byte adds to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def is_deeper(data: bytes, bound: int) -> bool:
    """Whether more than `bound` objects and lists are open at any place. For invalid JSON either answer may come."""
    if data.count(b"[") + data.count(b"{") <= bound:
        return False
    steps = _STEP[np.frombuffer(_STRING.sub(b"", data), np.uint8)]
    return bool(steps.size) and int(np.cumsum(steps, dtype=np.int32).max()) > bound
