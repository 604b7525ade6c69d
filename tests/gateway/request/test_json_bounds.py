"""A body's size in parts, found before it is parsed. A body of a million lists held every stream for seconds."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from gateway import json_bounds
from gateway.json_bounds import check_bounds
from gateway.json_object import parse_object

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.sampled_from([0.5, 20.25]) | st.text('a"\\[{,:1e'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{,:', max_size=3), inner, max_size=3),
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def values(value: Any) -> int:
    """Entries, an empty list or object counted as one."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else max(1, len(inner)) + sum(map(values, inner))


def parts(value: Any) -> int:
    """Objects, lists, members, strings, fractions, and of words true and false."""
    if isinstance(value, dict):
        return 1 + 2 * len(value) + sum(map(parts, value.values()))
    return 1 + sum(map(parts, value)) if isinstance(value, list) else int(isinstance(value, str | float | bool))


def refusal(data: bytes, **bounds: int) -> str:
    with mock.patch.multiple(json_bounds, **bounds):
        try:
            check_bounds(data)
        except InvalidRequest as error:
            return str(error)
    return ""


@settings(deadline=None)
@given(JSON, st.integers(0, 6))
def test_each_bound_is_that_of_the_parsed_value(value: Any, bound: int) -> None:
    data = json.dumps(value).encode()
    loose = {"MAX_DEPTH": 10**9, "MAX_VALUES": 10**9, "MAX_PARTS": 10**9}
    assert bool(refusal(data, **loose | {"MAX_DEPTH": bound})) == (depth(value) > bound)
    tight = loose | {"MAX_DEPTH": -1}  # or short texts are not looked at
    assert ("values" in refusal(data, **tight | {"MAX_VALUES": bound})) == (values(value) > bound)
    assert ("members" in refusal(data, **tight | {"MAX_PARTS": bound})) == (parts(value) > bound)


@pytest.mark.parametrize("data", [b'"' + b'\\"' * 500_000, b'"' + b"\\" * 999_999, b'"' * 999_999, b"[" * 999_999])
def test_hostile_text_costs_linear_time(data: bytes) -> None:
    """A quadratic search would take hours; a second is a hundred times what it takes."""
    started = time.thread_time()
    with suppress(InvalidRequest):
        check_bounds(b"[" * 70 + data)
    assert time.thread_time() - started < 10


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (b"1," * 600_000, "524288 values"),
        (b"[]," * 70_000, "65536 objects, lists, members and strings"),
        (b'"",' * 70_000, "65536 objects, lists, members and strings"),
        (b"1.5," * 70_000, "65536 objects, lists, members and strings"),
    ],
)
def test_a_large_body_says_what_there_is_too_much_of(entries: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_object(b'{"x": [' + entries + b"1]}")


def test_long_texts_and_many_token_ids_pass() -> None:
    text = 'def f(a, b): return {"a": [a, b], "c": 1.5}\n' * 40_000
    assert parse_object(json.dumps({"prompt": text}).encode())["prompt"] == text
    assert len(parse_object(json.dumps({"prompt": [31_999] * 500_000}).encode())["prompt"]) == 500_000
