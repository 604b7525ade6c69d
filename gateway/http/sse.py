"""Server-sent events over ASGI, and the watch for a client that has gone. Knows bytes; knows nothing of models.

An error within FIRST_EVENT_S is a plain answer, with a status of its own. If no event has come by then, headers go,
a comment follows in every pause that gets too long for what is between us and the client, and an error is an event.

Serve lets a client switch its own watch off by a header, so we keep our own: it is the same for every request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import RequestCancelled
from gateway.telemetry.logs import current_record

DONE = b"data: [DONE]\n\n"
COMMENT = b": still at work\n\n"  # as the standard has it; clients overlook it
FIRST_EVENT_S = 1.0
_T = TypeVar("_T")
AT_ONCE_BYTES = 2**22  # orjson lets no other thread run: these take it some 8 ms
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_bytes(document: object, num_bytes: int = 0) -> bytes:
    """Compact UTF-8 JSON. What gets about so many bytes, if very many, is made in short steps: other threads run."""
    if num_bytes <= AT_ONCE_BYTES:
        return orjson.dumps(document)
    return "".join(_ENCODER.iterencode(document)).encode()


def event(document: object, num_bytes: int = 0) -> bytes:
    """One event."""
    return b"data: " + json_bytes(document, num_bytes) + b"\n\n"


def named_events(*documents: Mapping[str, Any], size: int = 0) -> bytes:
    """Events that say their `type` in a line of their own, of about `size` bytes each."""
    return b"".join(b"event: " + document["type"].encode() + b"\n" + event(document, size) for document in documents)


async def unless_disconnected(request: HttpRequest, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, or RequestCancelled as soon as the client is gone; `work` is cancelled then.

    The body must have been read: what `receive` tells next is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestCancelled("the client has gone")
    finally:
        await _end(working)
        watching.cancel()


async def begun(
    request: HttpRequest, events: AsyncGenerator[bytes, None], error_event: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    """The same events, once there is a first or FIRST_EVENT_S are over; from then on an error is the last event."""
    first = asyncio.ensure_future(_next(events))
    try:
        await unless_disconnected(request, asyncio.wait((first,), timeout=FIRST_EVENT_S))
        if first.done():
            first.result()
    except BaseException:
        await _end(first)
        await events.aclose()
        raise
    chain = _chain(first, events, error_event)
    await anext(chain)  # one that has not begun would not end `first` and `events` when it is closed
    return chain


class EventStream(Response):
    """Sends events as they come, and comments between them; when the client goes, the generator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str], keepalive_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._keepalive_s = keepalive_s
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending)
            watching.cancel()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        commenting = asyncio.ensure_future(self._comment(send))
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._sent_at = loop.time()
        finally:
            await _end(commenting)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """One in every pause of `keepalive_s`."""
        loop = asyncio.get_running_loop()
        while True:
            pause_s = loop.time() - self._sent_at
            if pause_s >= self._keepalive_s:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._sent_at, pause_s = loop.time(), 0.0
            await asyncio.sleep(self._keepalive_s - pause_s)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _chain(
    first: asyncio.Future[bytes], rest: AsyncGenerator[bytes, None], error_event: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    try:
        yield b""  # to `begun`
        yield await first
        async for data in rest:
            yield data
    except Exception as error:
        if record := current_record():
            record.fail(error)  # it closed `rest` before, as a client's leave would
        yield error_event(error)
    finally:
        await _end(first)
        await rest.aclose()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel and wait, so that nothing of the request is left when we return."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # seen
