"""POST /v1/messages and /v1/messages/count_tokens over a Frontend. Knows this API's errors; shapes are those of
`gateway.messages.shape`."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster.errors import InvalidRequest
from gateway.http.body import read_body
from gateway.http.errors import error_body, json_response, of_messages, status_of
from gateway.http.events_door import Begun, EventsDoor
from gateway.json_object import parse_object
from gateway.messages.fields import Json, MessagesRequest, parse_count_body, parse_messages_body, renamed
from gateway.messages.shape import MessagesShape
from gateway.request.protocol import ChatCompletionRequest
from gateway.tokenize import TokenizeRequest, tokenize


class MessagesDoor(EventsDoor[MessagesShape]):
    """The routes."""

    async def count_tokens(self, request: HttpRequest) -> Response:
        """How many tokens the prompt of a request would have."""
        try:
            data = await read_body(request, self._frontend.config.max_body_bytes)
            asked = await self._frontend.worker.run(len(data), _counted, data)
            _, token_ids = await tokenize(self._frontend, asked)
        except InvalidRequest as error:
            raise renamed(error) from None
        return json_response({"input_tokens": len(token_ids)})

    async def _begin(self, data: bytes) -> Begun[MessagesShape]:
        body, chat = await self._frontend.worker.run(len(data), _parsed, data)
        generation = await self._frontend.chat(chat)
        return Begun(generation, MessagesShape(generation), streams=bool(body.stream))

    def _named(self, error: InvalidRequest) -> InvalidRequest:
        return renamed(error)

    def _error_event(self, error: Exception, asked: Begun[MessagesShape]) -> Json:
        request_id = asked.generation.id
        return of_messages(error_body(error, request_id), status_of(error)[0], request_id)

    def _headers(self, request_id: str) -> dict[str, str]:
        return {**super()._headers(request_id), "request-id": request_id}


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
