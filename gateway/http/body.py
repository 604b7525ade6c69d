"""Reads the body of an HTTP request that is said to be JSON, whatever the client sends instead. Parses nothing.

Everything wrong is an InvalidRequest or PayloadTooLarge; nothing larger than the limit is ever held.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from cluster.errors import InvalidRequest, PayloadTooLarge, RequestCancelled, UnsupportedEncoding


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
