"""POST of a route whose answer is named events or one document, over a Frontend: Messages and Responses have it alike.

Knows events on the wire; fields, errors and shapes are those of each API.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster.errors import InvalidRequest
from gateway.answer.chat import num_bytes
from gateway.answer.choice import Delta, Usage
from gateway.frontend import Frontend
from gateway.http.body import read_body
from gateway.http.errors import REQUEST_ID_HEADER, json_response
from gateway.http.sse import EventStream, begun, named_events, unless_disconnected
from gateway.request.validator import Generation

Json = dict[str, Any]


class Shape(Protocol):
    """The answer to one request: `begin`, `push` each delta, `end`; `whole` is all of it."""

    def begin(self, usage: Usage) -> Iterable[Json]:
        """The events before the first token's."""

    def push(self, delta: Delta) -> Iterable[Json]:
        """Those of one delta."""

    def end(self, usage: Usage) -> Iterable[Json]:
        """Those after the last token's."""

    def whole(self, usage: Usage) -> Json:
        """The document, after `end`."""


_S = TypeVar("_S", bound=Shape)


@dataclass(frozen=True, slots=True)
class Begun(Generic[_S]):
    """A request that has been accepted."""

    generation: Generation
    shape: _S
    streams: bool
    num_echoed_bytes: int = 0  # of the request, which the answer repeats


class EventsDoor(ABC, Generic[_S]):
    """The route; an API says what a body asks for and how an error reads."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    @abstractmethod
    async def _begin(self, data: bytes) -> Begun[_S]:
        """Read, admit and tokenize a body. Raises MantaError; what it says of a field `_named` gives the client's."""

    @abstractmethod
    def _named(self, error: InvalidRequest) -> InvalidRequest:
        """The same, about the field as this API has it."""

    @abstractmethod
    def _error_event(self, error: Exception, asked: Begun[_S]) -> Json:
        """What ends a stream in the middle."""

    async def create(self, request: HttpRequest) -> Response:
        """An error names the field as this API has it."""
        try:
            return await self._create(request)
        except InvalidRequest as error:
            raise self._named(error) from None

    async def _create(self, request: HttpRequest) -> Response:
        asked = await self._begin(await read_body(request, self._frontend.config.max_body_bytes))
        request.state.request_id = asked.generation.id
        headers = self._headers(asked.generation.id)
        if not asked.streams:
            return await unless_disconnected(request, self._whole(asked, headers))

        def ended_by(error: Exception) -> bytes:
            named = self._named(error) if isinstance(error, InvalidRequest) else error
            return named_events(self._error_event(named, asked))

        events = await begun(request, self._events(asked), ended_by)
        return EventStream(events, headers, self._frontend.config.keepalive_s)

    def _headers(self, request_id: str) -> dict[str, str]:
        return {REQUEST_ID_HEADER: request_id}

    async def _whole(self, asked: Begun[_S], headers: dict[str, str]) -> Response:
        usage = Usage(asked.generation.num_prompt_tokens)
        size = asked.num_echoed_bytes
        async with aclosing(self._frontend.generate(asked.generation, usage)) as deltas:
            async for delta in deltas:
                size += num_bytes(delta)
                await self._frontend.answer_worker.run(num_bytes(delta), deque, asked.shape.push(delta), 0)

        def response() -> Response:
            deque(asked.shape.end(usage), 0)
            return json_response(asked.shape.whole(usage), headers=headers, num_bytes=size)

        return await self._frontend.answer_worker.run(size, response)

    async def _events(self, asked: Begun[_S]) -> AsyncGenerator[bytes, None]:
        """Nothing before the first token: an error may still be a plain HTTP answer."""
        usage = Usage(asked.generation.num_prompt_tokens)
        has_begun = False
        size = asked.num_echoed_bytes
        async with aclosing(self._frontend.generate(asked.generation, usage)) as deltas:
            async for delta in deltas:
                if not has_begun:
                    has_begun = True
                    yield await self._said(size, asked.shape.begin(usage))
                size += num_bytes(delta)
                if said := await self._said(num_bytes(delta), asked.shape.push(delta)):
                    yield said
        yield await self._said(size, asked.shape.end(usage))

    async def _said(self, size: int, documents: Iterable[Json]) -> bytes:
        """Events of about so many bytes."""
        return await self._frontend.answer_worker.run(size, lambda: named_events(*documents, size=size))
