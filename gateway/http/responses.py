"""POST /v1/responses over a Frontend. Knows this API's errors; shapes are those of `gateway.responses.shape`."""

from __future__ import annotations

from cluster.errors import InvalidRequest
from gateway.http.errors import error_body
from gateway.http.events_door import Begun, EventsDoor
from gateway.json_object import parse_object
from gateway.request.protocol import ChatCompletionRequest
from gateway.responses.fields import Json, ResponsesRequest, parse_responses_body, renamed
from gateway.responses.shape import ResponsesShape


class ResponsesDoor(EventsDoor[ResponsesShape]):
    """The route."""

    async def _begin(self, data: bytes) -> Begun[ResponsesShape]:
        body, chat = await self._frontend.worker.run(len(data), _parsed, data)
        generation = await self._frontend.chat(chat, drops_oldest=body.truncation == "auto")
        shape = ResponsesShape(generation, body, self._frontend.served(generation.card).tokenizer)
        return Begun(generation, shape, streams=bool(body.stream), num_echoed_bytes=body.num_bytes)

    def _named(self, error: InvalidRequest) -> InvalidRequest:
        return renamed(error)

    def _error_event(self, error: Exception, asked: Begun[ResponsesShape]) -> Json:
        return asked.shape.error(error_body(error, asked.generation.id))


def _parsed(data: bytes) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    return parse_responses_body(parse_object(data), len(data))
