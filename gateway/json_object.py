"""Reads a JSON object that a client wrote, a body or a text within one. Knows bytes; knows no fields."""

from __future__ import annotations

from typing import Any

import orjson

from cluster.errors import InvalidRequest
from gateway.json_bounds import check_bounds


def parse_object(data: bytes, what: str = "the body") -> dict[str, Any]:
    """Strict JSON in UTF-8: no NaN, no lone surrogates, within `gateway.json_bounds`.

    A whole number of more than 64 bits is the nearest fraction's, as in JavaScript. Raises InvalidRequest, which says
    of `what` is read why it is none, and where.
    """
    check_bounds(data, what)
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {_why(data, error)}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"{what} must be a JSON object")
    return document


def _why(data: bytes, error: orjson.JSONDecodeError) -> str:
    """The parser says what it expected and where, but for an empty text and for one in another encoding."""
    if not data:
        return "it is empty"
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        return f"it is not valid UTF-8: byte {wrong.start + 1}"
    return f"{error.msg}: line {error.lineno} column {error.colno}"
