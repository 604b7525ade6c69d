"""POST /v1/responses over a Frontend. Knows events on the wire; shapes are those of `responses_shape`."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster.errors import InvalidRequest
from gateway.choice import Usage
from gateway.frontend import Frontend
from gateway.http_body import parse_object, read_body
from gateway.http_errors import REQUEST_ID_HEADER, error_body, json_response
from gateway.protocol import ChatCompletionRequest
from gateway.responses_api import Json, ResponsesRequest, parse_responses_body, renamed
from gateway.responses_shape import ResponsesShape
from gateway.sse import EventStream, event, first_then_rest, unless_disconnected
from gateway.validator import Generation


class ResponsesDoor:
    """The route."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def create(self, request: HttpRequest) -> Response:
        """An error names the field as this API has it."""
        try:
            return await self._create(request)
        except InvalidRequest as error:
            raise renamed(error) from None

    async def _create(self, request: HttpRequest) -> Response:
        data = await read_body(request, self._frontend.config.max_body_bytes)
        body, chat = await self._frontend.worker.run(len(data), _parsed, data)
        generation = await self._frontend.chat(chat)
        request.state.request_id = generation.id
        shape = ResponsesShape(generation, body)
        if not body.stream:
            return await unless_disconnected(request, self._whole(generation, shape))
        events = await first_then_rest(request, self._events(generation, shape))
        return EventStream(events, {REQUEST_ID_HEADER: generation.id})

    async def _whole(self, generation: Generation, shape: ResponsesShape) -> Response:
        usage = Usage(generation.num_prompt_tokens)
        finish_reason = None
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                deque(shape.push(delta), maxlen=0)
                finish_reason = delta.finish_reason
        *_, last = shape.end(finish_reason, usage)
        return json_response(last["response"], headers={REQUEST_ID_HEADER: generation.id})

    async def _events(self, generation: Generation, shape: ResponsesShape) -> AsyncGenerator[bytes, None]:
        """Nothing before the first token: until then an error is a plain HTTP answer."""
        usage = Usage(generation.num_prompt_tokens)
        begun = False
        finish_reason = None
        try:
            async with aclosing(self._frontend.generate(generation, usage)) as deltas:
                async for delta in deltas:
                    if not begun:
                        begun = True
                        yield _joined(*shape.begin())
                    if said := _joined(*shape.push(delta)):
                        yield said
                    finish_reason = delta.finish_reason
        except Exception as error:
            if not begun:
                raise
            yield _joined(shape.error(error_body(error, generation.id)))
            return
        yield _joined(*shape.end(finish_reason, usage))


def _parsed(data: bytes) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    return parse_responses_body(parse_object(data), len(data))


def _joined(*documents: Json) -> bytes:
    """Events with their names, as this API has them."""
    return b"".join(b"event: " + document["type"].encode() + b"\n" + event(document) for document in documents)
