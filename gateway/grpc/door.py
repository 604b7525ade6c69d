"""The gRPC door: chat.proto's methods over a Frontend. Knows messages and status codes only.

Serve calls these methods by the RPC's name; a grpc.aio server takes the same object as its servicer.
A client's deadline reaches us as a cancellation (Serve does not pass it on), so it ends the sequence like a client
that has gone; on a plain grpc.aio server it also bounds the request itself.
"""
# ruff: noqa: N802  # the RPCs' names

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from gateway.answer.chat import num_bytes
from gateway.answer.choice import Delta, Usage
from gateway.embeddings import EmbeddingJob, vectors
from gateway.frontend import Frontend
from gateway.grpc.call import rpc_call
from gateway.grpc.chat import chat_fields
from gateway.grpc.errors import RpcFailed, failing_stream
from gateway.grpc.health import HealthRpcs
from gateway.grpc.messages import (
    choice,
    completion_fields,
    echoed,
    embedding_fields,
    embedding_message,
    head,
    kernel_fields,
    num_echoed_bytes,
    sampling_fields,
    usage_message,
)
from gateway.grpc.proto import chat_pb2
from gateway.grpc.tokenize import TokenizationRpcs
from gateway.grpc.watches import Watches
from gateway.request.protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, parse_body
from gateway.request.validator import Generation

_MessageT = TypeVar("_MessageT")
_JobT = TypeVar("_JobT", bound=Generation | EmbeddingJob)


class GrpcDoor(HealthRpcs, TokenizationRpcs):
    """The RPCs."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.watches = Watches()

    async def Chat(self, request: chat_pb2.ChatRequest, grpc_context: Any) -> chat_pb2.ChatResponse:
        return await self._unary(chat_pb2.ChatResponse, request, grpc_context, self._chat, self._whole)

    async def Generate(self, request: chat_pb2.GenerateRequest, grpc_context: Any) -> chat_pb2.GenerateResponse:
        return await self._unary(chat_pb2.GenerateResponse, request, grpc_context, self._generate, self._whole)

    async def Embed(self, request: chat_pb2.EmbedRequest, grpc_context: Any) -> chat_pb2.EmbedResponse:
        return await self._unary(chat_pb2.EmbedResponse, request, grpc_context, self._embedding, self._embed)

    async def ChatStream(
        self, request: chat_pb2.ChatRequest, grpc_context: Any
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        with failing_stream():
            async with aclosing(self._stream(request, grpc_context, self._chat)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def GenerateStream(
        self, request: chat_pb2.GenerateRequest, grpc_context: Any
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        with failing_stream():
            async with aclosing(self._stream(request, grpc_context, self._generate)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def ListModels(
        self,
        request: chat_pb2.ListModelsRequest,
        grpc_context: Any,
    ) -> chat_pb2.ListModelsResponse:
        try:
            async with rpc_call(self.frontend, request, grpc_context, is_counted=False):
                return await self._models()
        except RpcFailed:
            return chat_pb2.ListModelsResponse()  # never sent: the status is not OK

    async def _models(self) -> chat_pb2.ListModelsResponse:
        health = await self.frontend.health.models()
        watch = self.frontend.kernels
        return chat_pb2.ListModelsResponse(
            models=[
                chat_pb2.Model(
                    name=card.name,
                    aliases=card.aliases,
                    fingerprint=card.fingerprint,
                    max_model_len=card.max_model_len,
                    created=card.created,
                    ready=health[card.name].phase == "ready",
                    kind=card.kind,
                    revision=card.revision or "",
                    system_fingerprint=watch.system_fingerprint(card),
                    **kernel_fields(watch.of(card)),
                )
                for card in self.frontend.cards
            ]
        )

    async def _chat(self, request: chat_pb2.ChatRequest, timeout_s: float | None) -> Generation:
        body = await self.frontend.worker.run(request.ByteSize(), _chat_body, request)
        return await self.frontend.chat(body, timeout_s)

    async def _generate(self, request: chat_pb2.GenerateRequest, timeout_s: float | None) -> Generation:
        body = await self.frontend.worker.run(request.ByteSize(), _completion_body, request)
        return await self.frontend.completion(body, timeout_s)

    async def _embedding(self, request: chat_pb2.EmbedRequest, timeout_s: float | None) -> EmbeddingJob:
        body = await self.frontend.worker.run(request.ByteSize(), _embedding_body, request)
        return await self.frontend.embedding(body, timeout_s)

    async def _unary(
        self,
        response_type: Callable[..., _MessageT],
        request: Any,
        context: Any,
        prepare: Callable[[Any, float | None], Coroutine[Any, Any, _JobT]],
        answer: Callable[[Callable[..., _MessageT], _JobT], Coroutine[Any, Any, _MessageT]],
    ) -> _MessageT:
        try:
            async with rpc_call(self.frontend, request, context) as call:
                job = await prepare(request, call.time_left_s)
                call.name(job.id)
                return await answer(response_type, job)
        except RpcFailed:
            return response_type()  # never sent: the status is not OK

    async def _whole(self, response_type: Callable[..., _MessageT], generation: Generation) -> _MessageT:
        usage = Usage(generation.num_prompt_tokens)
        choices = await self.frontend.whole(generation, usage)

        def response() -> _MessageT:
            return response_type(
                **head(generation),
                system_fingerprint=generation.system_fingerprint,
                choices=[choice(i, whole, echoed(generation, i)) for i, whole in enumerate(choices)],
                usage=usage_message(usage),
            )

        size = sum(num_bytes(whole) + num_echoed_bytes(generation, i) for i, whole in enumerate(choices))
        return await self.frontend.answer_worker.run(size, response)

    async def _embed(self, response_type: Callable[..., _MessageT], job: EmbeddingJob) -> _MessageT:
        answer = await self.frontend.embed(job)

        def response() -> _MessageT:
            return response_type(
                **head(job),
                embeddings=[embedding_message(i, vector) for i, vector in enumerate(vectors(job, answer))],
                usage=usage_message(Usage(job.num_prompt_tokens)),
            )

        return await self.frontend.answer_worker.run(4 * job.dimensions * len(answer), response)

    async def _stream(
        self,
        request: Any,
        context: Any,
        prepare: Callable[[Any, float | None], Coroutine[Any, Any, Generation]],
    ) -> AsyncGenerator[chat_pb2.Chunk, None]:
        async with rpc_call(self.frontend, request, context, suffix="Stream") as call:
            generation = await prepare(request, call.time_left_s)
            call.name(generation.id)
            usage = Usage(generation.num_prompt_tokens)
            running = len(generation.requests)
            begun: set[int] = set()
            async with aclosing(self.frontend.generate(generation, usage)) as deltas:
                async for delta in deltas:
                    running -= delta.finish_reason is not None
                    is_first = delta.index not in begun
                    begun.add(delta.index)
                    size = num_bytes(delta) + (num_echoed_bytes(generation, delta.index) if is_first else 0)
                    counts = None if running else usage
                    yield await self.frontend.answer_worker.run(size, _chunk, generation, delta, counts, is_first)


def _chunk(generation: Generation, delta: Delta, usage: Usage | None, is_first: bool) -> chat_pb2.Chunk:
    return chat_pb2.Chunk(
        **head(generation),
        system_fingerprint=generation.system_fingerprint,
        choice=choice(delta.index, delta, echoed(generation, delta.index) if is_first else None),
        usage=None if usage is None else usage_message(usage),
    )


def _chat_body(request: chat_pb2.ChatRequest) -> ChatCompletionRequest:
    document = sampling_fields(request.sampling)
    top = document.pop("logprobs", None)
    if top is not None:
        document |= {"logprobs": True, "top_logprobs": top}
    document |= {"model": request.model, **chat_fields(request)}
    return parse_body(ChatCompletionRequest, document, request.ByteSize())


def _completion_body(request: chat_pb2.GenerateRequest) -> CompletionRequest:
    return parse_body(CompletionRequest, completion_fields(request), request.ByteSize())


def _embedding_body(request: chat_pb2.EmbedRequest) -> EmbeddingRequest:
    return parse_body(EmbeddingRequest, embedding_fields(request), request.ByteSize())
