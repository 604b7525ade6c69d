"""POST /v1/messages and /v1/messages/count_tokens over a Frontend. Knows events on the wire and this API's errors;
shapes are those of `gateway.messages.shape`."""

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
from gateway.http.errors import REQUEST_ID_HEADER, error_body, json_response, of_messages, status_of
from gateway.http.sse import EventStream, begun, named_events, unless_disconnected
from gateway.json_object import parse_object
from gateway.messages.fields import Json, MessagesRequest, parse_count_body, parse_messages_body, renamed
from gateway.messages.shape import MessagesShape
from gateway.request.protocol import ChatCompletionRequest
from gateway.request.validator import Generation
from gateway.tokenize import TokenizeRequest, tokenize


class MessagesDoor:
    """The routes."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def create(self, request: HttpRequest) -> Response:
        """An error names the field as this API has it."""
        try:
            return await self._create(request)
        except InvalidRequest as error:
            raise renamed(error) from None

    async def count_tokens(self, request: HttpRequest) -> Response:
        """How many tokens the prompt of a request would have."""
        try:
            data = await read_body(request, self._frontend.config.max_body_bytes)
            asked = await self._frontend.worker.run(len(data), _counted, data)
            _, token_ids = await tokenize(self._frontend, asked)
        except InvalidRequest as error:
            raise renamed(error) from None
        return json_response({"input_tokens": len(token_ids)})

    async def _create(self, request: HttpRequest) -> Response:
        data = await read_body(request, self._frontend.config.max_body_bytes)
        body, chat = await self._frontend.worker.run(len(data), _parsed, data)
        generation = await self._frontend.chat(chat)
        request.state.request_id = generation.id
        shape = MessagesShape(generation)
        headers = {REQUEST_ID_HEADER: generation.id, "request-id": generation.id}
        if not body.stream:
            return await unless_disconnected(request, self._whole(generation, shape, headers))
        events = await begun(request, self._events(generation, shape), lambda error: _error(error, generation.id))
        return EventStream(events, headers, self._frontend.config.keepalive_s)

    async def _whole(self, generation: Generation, shape: MessagesShape, headers: dict[str, str]) -> Response:
        usage = Usage(generation.num_prompt_tokens)
        size = 0
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                size += num_bytes(delta)
                await self._frontend.answer_worker.run(num_bytes(delta), deque, shape.push(delta), 0)

        def response() -> Response:
            deque(shape.end(usage), 0)
            return json_response(shape.whole(usage), headers=headers, num_bytes=size)

        return await self._frontend.answer_worker.run(size, response)

    async def _events(self, generation: Generation, shape: MessagesShape) -> AsyncGenerator[bytes, None]:
        """Nothing before the first token: an error may still be a plain HTTP answer."""
        usage = Usage(generation.num_prompt_tokens)
        has_begun = False
        size = 0
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                if not has_begun:
                    has_begun = True
                    yield named_events(*shape.begin(usage))
                size += num_bytes(delta)
                if said := await self._said(num_bytes(delta), shape.push(delta)):
                    yield said
        yield await self._said(size, shape.end(usage))

    async def _said(self, size: int, documents: Iterable[Json]) -> bytes:
        return await self._frontend.answer_worker.run(size, lambda: named_events(*documents, size=size))


def _parsed(data: bytes) -> tuple[MessagesRequest, ChatCompletionRequest]:
    return parse_messages_body(parse_object(data), len(data))


def _counted(data: bytes) -> TokenizeRequest:
    chat = parse_count_body(parse_object(data), len(data))
    asked = TokenizeRequest(
        model=chat.model,
        messages=chat.messages,
        tools=chat.tools,
        continue_final_message=chat.continue_final_message,
        reasoning_effort=chat.reasoning_effort,
    )
    asked._num_bytes = len(data)
    return asked


def _error(error: Exception, request_id: str) -> bytes:
    """The event that ends a stream in the middle."""
    named = renamed(error) if isinstance(error, InvalidRequest) else error
    return named_events(of_messages(error_body(named, request_id), status_of(named)[0], request_id))
