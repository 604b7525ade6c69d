"""Reads a JSON object from an HTTP request, whatever the client sends instead. Knows bytes and JSON, no fields.

Everything wrong is an InvalidRequest or PayloadTooLarge; nothing larger than the limit is ever held.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from cluster.errors import InvalidRequest, PayloadTooLarge, RequestCancelled, UnsupportedEncoding
from gateway.json_bounds import check_bounds


async def read_body(request: HttpRequest, max_bytes: int) -> bytes:
    """The body, said to be JSON. Raises InvalidRequest, PayloadTooLarge, or RequestCancelled when the client left."""
    codings = {coding.strip().lower() for coding in ",".join(request.headers.getlist("content-encoding")).split(",")}
    if codings - {"", "identity"}:
        raise UnsupportedEncoding(
            "Content-Encoding: a coded body is not read; send it plain, without this header",
            param="Content-Encoding",
        )
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequest(f"Content-Type: expected application/json, got {media_type!r}", param="Content-Type")
    return await _read(request, max_bytes)


def parse_object(data: bytes) -> dict[str, Any]:
    """Strict JSON in UTF-8: no NaN, no lone surrogates, within `gateway.json_bounds`. Raises InvalidRequest."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is invalid") from None
    check_bounds(data)
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    if b"\\u" in data:  # else there is no way to write a lone surrogate
        _check(document)
    return document


async def _read(request: HttpRequest, max_bytes: int) -> bytes:
    too_large = PayloadTooLarge(f"the body is over the limit of {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise RequestCancelled("the client has gone") from None
    return b"".join(parts)


def _check(document: dict[str, Any]) -> None:
    """Walks without recursion: text that cannot be encoded."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, dict | list):
            if isinstance(value, dict):
                for key in value:
                    _check_text(path, key)
                waiting += [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
            elif not all(type(item) is int for item in value):  # token ids need no walk
                waiting += [
                    (f"{path}[{i}]", item) for i, item in enumerate(value) if isinstance(item, str | dict | list)
                ]


def _check_text(path: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{path or 'the body'}: a lone surrogate is not text", param=path or None) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
