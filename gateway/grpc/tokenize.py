"""Tokenize and Detokenize. A mixin of the gRPC door, because Serve finds RPCs by their names there."""
# ruff: noqa: N802  # the RPCs' names

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cluster.errors import DeadlineExceeded
from gateway.deadline import PASSED
from gateway.frontend import Frontend
from gateway.grpc.call import rpc_call
from gateway.grpc.chat import conversation_fields, set_fields, template_fields
from gateway.grpc.errors import RpcFailed
from gateway.grpc.proto import chat_pb2
from gateway.request.prompts import check_count
from gateway.request.protocol import parse_body
from gateway.tokenize import DetokenizeRequest, TokenizeRequest, detokenize, token_strings, tokenize

TOKEN_BYTES = 4  # about, of an id; as text, a few more

_MessageT = TypeVar("_MessageT")


class TokenizationRpcs:
    """Both, behind the same authentication and with the same codes as every RPC."""

    frontend: Frontend

    async def Tokenize(self, request: chat_pb2.TokenizeRequest, grpc_context: Any) -> chat_pb2.TokenizeResponse:
        return await self._answer(chat_pb2.TokenizeResponse, request, grpc_context, self._tokenize)

    async def Detokenize(self, request: chat_pb2.DetokenizeRequest, grpc_context: Any) -> chat_pb2.DetokenizeResponse:
        return await self._answer(chat_pb2.DetokenizeResponse, request, grpc_context, self._detokenize)

    async def _tokenize(self, request: chat_pb2.TokenizeRequest) -> chat_pb2.TokenizeResponse:
        body = await self.frontend.worker.run(request.ByteSize(), _tokenize_body, request)
        model, token_ids = await tokenize(self.frontend, body)

        def response() -> chat_pb2.TokenizeResponse:
            return chat_pb2.TokenizeResponse(
                model=model.card.name,
                token_ids=token_ids,
                max_model_len=model.card.max_model_len,
                token_strs=token_strings(model, token_ids) if body.return_token_strs else (),
            )

        return await self.frontend.answer_worker.run(TOKEN_BYTES * len(token_ids), response)

    async def _detokenize(self, request: chat_pb2.DetokenizeRequest) -> chat_pb2.DetokenizeResponse:
        card = self.frontend.route(request.model or None).card
        check_count(len(request.token_ids), card, "tokens", "tokens")  # before they become a list
        body = await self.frontend.worker.run(request.ByteSize(), _detokenize_body, request)
        return chat_pb2.DetokenizeResponse(model=card.name, text=await detokenize(self.frontend, body))

    async def _answer(
        self,
        response_type: Callable[..., _MessageT],
        request: Any,
        context: Any,
        answer: Callable[[Any], Coroutine[Any, Any, _MessageT]],
    ) -> _MessageT:
        try:
            async with rpc_call(self.frontend, request, context) as call:
                try:
                    async with asyncio.timeout(call.time_left_s):
                        return await answer(request)
                except TimeoutError:
                    raise DeadlineExceeded(PASSED) from None
        except RpcFailed:
            return response_type()  # never sent: the status is not OK


def _tokenize_body(request: chat_pb2.TokenizeRequest) -> TokenizeRequest:
    document: dict[str, Any] = {"model": request.model or None}
    if request.WhichOneof("input") == "text":
        document["prompt"] = request.text
    elif request.WhichOneof("input") == "conversation":
        document |= conversation_fields(request.conversation)
    document |= template_fields(request) | set_fields(request, "return_token_strs")
    return parse_body(TokenizeRequest, document, request.ByteSize())


def _detokenize_body(request: chat_pb2.DetokenizeRequest) -> DetokenizeRequest:
    document = {"model": request.model or None, "tokens": list(request.token_ids)}
    return parse_body(DetokenizeRequest, document, request.ByteSize())
