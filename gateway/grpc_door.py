"""The gRPC door: chat.proto's methods over a Frontend, and grpc.health.v1. Knows messages and status codes only.

Serve calls these methods by the RPC's name; a grpc.aio server takes the same object as its servicer.
A client's deadline reaches us as a cancellation (Serve does not pass it on), so it ends the sequence like a client
that has gone; on a plain grpc.aio server it also bounds the request itself.
"""
# ruff: noqa: N802  # the RPCs' names

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from cluster.errors import PayloadTooLarge
from gateway import chat_pb2
from gateway.frontend import Delta, Frontend, Usage
from gateway.grpc_errors import RpcFailed, fail, status_of
from gateway.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from gateway.responses import ChoiceText
from gateway.validator import Generation

SERVICE = "manta.v1.Manta"
WATCH_INTERVAL_S = 0.5
FINISH = {
    None: chat_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": chat_pb2.FINISH_REASON_STOP,
    "length": chat_pb2.FINISH_REASON_LENGTH,
}
_MessageT = TypeVar("_MessageT")


class GrpcDoor:
    """The RPCs."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    async def Chat(self, request: chat_pb2.ChatRequest, grpc_context: Any) -> chat_pb2.ChatResponse:
        return await self._unary(chat_pb2.ChatResponse, request, grpc_context, self._chat)

    async def Generate(self, request: chat_pb2.GenerateRequest, grpc_context: Any) -> chat_pb2.GenerateResponse:
        return await self._unary(chat_pb2.GenerateResponse, request, grpc_context, self._generate)

    async def ChatStream(
        self, request: chat_pb2.ChatRequest, grpc_context: Any
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        async with aclosing(self._stream(request, grpc_context, self._chat)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def GenerateStream(
        self, request: chat_pb2.GenerateRequest, grpc_context: Any
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        async with aclosing(self._stream(request, grpc_context, self._generate)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def ListModels(
        self,
        request: chat_pb2.ListModelsRequest,  # noqa: ARG002
        grpc_context: Any,  # noqa: ARG002
    ) -> chat_pb2.ListModelsResponse:
        health = await self.frontend.health.models()
        return chat_pb2.ListModelsResponse(
            models=[
                chat_pb2.Model(
                    name=card.name,
                    aliases=card.aliases,
                    fingerprint=card.fingerprint,
                    max_model_len=card.max_model_len,
                    created=card.created,
                    ready=health[card.name].phase == "ready",
                )
                for card in self.frontend.cards
            ]
        )

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING when every model can answer."""
        status = await self._serving(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await fail(grpc_context, grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        grpc_context: Any,  # noqa: ARG002
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """grpc.health.v1: the status now and whenever it changes, until the client or the door's timeout ends it."""
        last = None
        while True:
            status = await self._serving(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def List(
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        grpc_context: Any,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """grpc.health.v1: every service's status."""
        response = health_pb2.HealthListResponse()
        for service in ("", SERVICE):
            response.statuses[service].status = await self._serving(service)
        return response

    async def _serving(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        models = await self.frontend.health.models()
        if all(state.phase == "ready" for state in models.values()):
            return int(health_pb2.HealthCheckResponse.SERVING)
        return int(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _chat(self, request: chat_pb2.ChatRequest, timeout_s: float | None) -> Generation:
        document = _sampling(request.sampling)
        top = document.pop("logprobs", None)
        if top is not None:
            document |= {"logprobs": True, "top_logprobs": top}
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        body = parse_body(ChatCompletionRequest, {"model": request.model, "messages": messages, **document})
        return await self.frontend.chat(body, timeout_s)

    async def _generate(self, request: chat_pb2.GenerateRequest, timeout_s: float | None) -> Generation:
        prompt: Any = None
        if request.WhichOneof("prompt") == "text":
            prompt = request.text
        elif request.WhichOneof("prompt") == "token_ids":
            prompt = list(request.token_ids.ids)
        document = {"model": request.model, "prompt": prompt, **_sampling(request.sampling)}
        return await self.frontend.completion(parse_body(CompletionRequest, document), timeout_s)

    async def _unary(
        self,
        response_type: Callable[..., _MessageT],
        request: Any,
        context: Any,
        prepare: Callable[[Any, float | None], Coroutine[Any, Any, Generation]],
    ) -> _MessageT:
        request_id = f"req-{uuid.uuid4().hex}"
        try:
            generation = await prepare(self._checked(request), _time_left(context))
            request_id = generation.id
            context.set_trailing_metadata([("x-request-id", request_id)])
            usage = Usage(generation.num_prompt_tokens)
            choices = [ChoiceText() for _ in generation.requests]
            async with aclosing(self.frontend.generate(generation, usage)) as deltas:
                async for delta in deltas:
                    choices[delta.index].add(delta)
        except Exception as error:
            context.set_trailing_metadata([("x-request-id", request_id)])
            await fail(context, *status_of(error, request_id))
            return response_type()  # never sent: the status is not OK
        return response_type(
            **_head(generation),
            choices=[
                _choice(i, choice.text, choice.token_ids, choice.logprobs, choice.finish_reason)
                for i, choice in enumerate(choices)
            ],
            usage=_usage(usage),
        )

    async def _stream(
        self,
        request: Any,
        context: Any,
        prepare: Callable[[Any, float | None], Coroutine[Any, Any, Generation]],
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        request_id = f"req-{uuid.uuid4().hex}"
        try:
            generation = await prepare(self._checked(request), _time_left(context))
            request_id = generation.id
            context.set_trailing_metadata([("x-request-id", request_id)])
            usage = Usage(generation.num_prompt_tokens)
            running = len(generation.requests)
            async with aclosing(self.frontend.generate(generation, usage)) as deltas:
                async for delta in deltas:
                    running -= delta.finish_reason is not None
                    yield chat_pb2.Chunk(
                        **_head(generation), choice=_delta(delta), usage=None if running else _usage(usage)
                    )
        except Exception as error:
            context.set_trailing_metadata([("x-request-id", request_id)])
            await fail(context, *status_of(error, request_id))
            raise RpcFailed(str(error)) from None

    def _checked(self, request: Any) -> Any:
        bound = self.frontend.config.max_body_bytes
        if request.ByteSize() > bound:
            raise PayloadTooLarge(f"the message is over the limit of {bound} bytes")
        return request


def _sampling(sampling: chat_pb2.Sampling) -> dict[str, Any]:
    """Only the fields that are set, under the bodies' names."""
    document: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name == "logit_bias":
            document["logit_bias"] = {str(token_id): bias for token_id, bias in value.items()}
        elif field.name in ("stop", "stop_token_ids"):
            document[field.name] = list(value)
        else:
            document[field.name] = value
    return document


def _time_left(context: Any) -> float | None:
    """Seconds until the client's deadline, where the context knows it."""
    time_remaining = getattr(context, "time_remaining", None)
    return None if time_remaining is None else time_remaining()


def _head(generation: Generation) -> dict[str, Any]:
    return {"id": generation.id, "model": generation.card.name, "created": generation.created}


def _delta(delta: Delta) -> chat_pb2.Choice:
    return _choice(delta.index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)


def _choice(index: int, text: str, token_ids: Any, logprobs: Any, finish_reason: Any) -> chat_pb2.Choice:
    return chat_pb2.Choice(
        index=index,
        text=text,
        token_ids=token_ids,
        logprobs=[
            chat_pb2.TokenLogprob(
                token_id=token_id,
                logprob=at.token_logprob,
                top=[chat_pb2.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in at.top],
            )
            for token_id, at in zip(token_ids, logprobs or (), strict=False)
        ],
        finish_reason=FINISH[finish_reason],
    )


def _usage(usage: Usage) -> chat_pb2.Usage:
    return chat_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
