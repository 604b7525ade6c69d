"""POST /v1/responses over a Frontend. Knows events on the wire; shapes are those of `gateway.responses.shape`."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster.errors import InvalidRequest
from gateway.answer.chat import num_bytes
from gateway.answer.choice import Usage
from gateway.frontend import Frontend
from gateway.http.body import read_body
from gateway.http.errors import REQUEST_ID_HEADER, error_body, json_response
from gateway.http.sse import EventStream, begun, named_events, unless_disconnected
from gateway.json_object import parse_object
from gateway.request.protocol import ChatCompletionRequest
from gateway.request.validator import Generation
from gateway.responses.fields import Json, ResponsesRequest, parse_responses_body, renamed
from gateway.responses.shape import ResponsesShape


class ResponsesDoor:
    """The route."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def create(self, request: HttpRequest) -> Response:
        """An error names the field as this API has it."""
        try:
            return await self._create(request)
        except InvalidRequest as error:
            raise _named(error) from None

    async def _create(self, request: HttpRequest) -> Response:
        data = await read_body(request, self._frontend.config.max_body_bytes)
        body, chat = await self._frontend.worker.run(len(data), _parsed, data)
        generation = await self._frontend.chat(chat, drops_oldest=body.truncation == "auto")
        request.state.request_id = generation.id
        shape = ResponsesShape(generation, body, self._frontend.served(generation.card).tokenizer)
        if not body.stream:
            return await unless_disconnected(request, self._whole(body, generation, shape))
        events = await begun(
            request,
            self._events(body, generation, shape),
            lambda error: named_events(shape.error(error_body(_named(error), generation.id))),
        )
        return EventStream(events, {REQUEST_ID_HEADER: generation.id}, self._frontend.config.keepalive_s)

    async def _whole(self, body: ResponsesRequest, generation: Generation, shape: ResponsesShape) -> Response:
        usage = Usage(generation.num_prompt_tokens)
        finish_reason = None
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                await self._frontend.answer_worker.run(num_bytes(delta), deque, shape.push(delta), 0)
                finish_reason = delta.finish_reason
        size = _num_bytes(body, usage)

        def response() -> Response:
            *_, last = shape.end(finish_reason, usage)
            return json_response(last["response"], headers={REQUEST_ID_HEADER: generation.id}, num_bytes=size)

        return await self._frontend.answer_worker.run(size, response)

    async def _events(
        self, body: ResponsesRequest, generation: Generation, shape: ResponsesShape
    ) -> AsyncGenerator[bytes, None]:
        """Nothing before the first token: an error may still be a plain HTTP answer."""
        usage = Usage(generation.num_prompt_tokens)
        has_begun = False
        finish_reason = None
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                if not has_begun:
                    has_begun = True
                    yield await self._said(_num_bytes(body, usage), shape.begin())
                if said := await self._said(num_bytes(delta), shape.push(delta)):
                    yield said
                finish_reason = delta.finish_reason
        yield await self._said(_num_bytes(body, usage), shape.end(finish_reason, usage))

    async def _said(self, size: int, documents: Iterable[Json]) -> bytes:
        """Events that have the whole of the request or of its answer."""
        return await self._frontend.answer_worker.run(size, lambda: named_events(*documents, size=size))


def _parsed(data: bytes) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    return parse_responses_body(parse_object(data), len(data))


def _named(error: Exception) -> Exception:
    """The same, about the field as this API has it."""
    return renamed(error) if isinstance(error, InvalidRequest) else error


def _num_bytes(body: ResponsesRequest, usage: Usage) -> int:
    """About how long the answer's JSON gets: it has what was asked, and the text."""
    logprobs = 100 * (1 + (body.top_logprobs or 0)) if body.wants_logprobs else 0
    return body.num_bytes + (4 + logprobs) * usage.completion_tokens
