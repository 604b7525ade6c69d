"""How the gateway calls a coordinator. Knows Serve's handle and its errors; knows nothing of text or doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from cluster.errors import CoordinatorLost, MantaError, Overloaded, Unavailable
from cluster.messages import Embedding, EngineStats, ModelCard, Request, TokenChunk
from gateway.coordinators.table import TABLE
from gateway.coordinators.token_inbox import ChunkQueue, TokenInbox
from gateway.coordinators.token_streams import TokenStreams

COORDINATOR = "coordinator"  # the deployment's name inside a model's application
STATS_TIMEOUT_S = 5.0
LAST_TOKENS_S = 5.0  # that tokens may come after the call has returned which sent them
LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # where replicas talk gRPC to each other


class CoordinatorClient(Protocol):
    """One model's coordinators. Closing the stream of `generate` early aborts the sequence."""

    def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        """Chunks of one choice. Raises MantaError."""

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        """The embedding of each prompt, in order; cancelling aborts them. Raises MantaError."""

    async def stats(self) -> EngineStats:
        """A snapshot of one coordinator. Raises MantaError."""


class ServeCoordinatorClient:
    """The real one, over a Serve DeploymentHandle; Serve picks the replica.

    A call of `generate` lasts as long as its sequence and returns nothing: tokens come in the coordinator's one stream.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._inbox = TokenInbox(TABLE)
        self._handle: Any = None
        self._generate: Any = None
        self._streams: TokenStreams | None = None

    async def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        self._connect()
        with self._inbox.expect(request) as queue:
            response = self._generate.remote(request, self._inbox.id)
            call = asyncio.ensure_future(_result(response))
            call.add_done_callback(lambda call: _tell(queue, call))
            try:
                async for chunk in queue:
                    yield chunk
            finally:
                if not (queue.is_complete or call.done()):
                    response.cancel()

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        self._connect()
        with self._inbox.expect(requests[0]) as queue:  # no token comes, only word that the coordinator is lost
            response = self._handle.embed.remote(requests)
            call = asyncio.ensure_future(_result(response))
            loss = asyncio.ensure_future(queue.failure())
            try:
                await asyncio.wait((call, loss), return_when=asyncio.FIRST_COMPLETED)
                if (error := _failure(call) if call.done() else await loss) is not None:
                    raise error
                embeddings: tuple[Embedding, ...] = call.result()
            finally:
                loss.cancel()
                if not call.done():
                    call.cancel()
                    response.cancel()
        return embeddings

    async def stats(self) -> EngineStats:
        self._connect()
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                stats: EngineStats = await self._handle.stats.remote()
        except Exception as error:
            raise manta_error(error) from error
        return stats

    async def close(self) -> None:
        """End the streams of tokens, before the event loop does."""
        if self._streams is not None:
            await self._streams.close()

    def _connect(self) -> None:
        """Only inside a replica, and only once its application exists."""
        if self._handle is None:
            from ray import serve

            handle = serve.get_deployment_handle(COORDINATOR, app_name=self._card.application)
            # Plain pickle: Serve's own choice costs more than all else of a chunk, and only matters for local classes.
            plain = {"request_serialization": "pickle", "response_serialization": "pickle"}
            self._generate = handle.options(method_name="generate", **plain)
            streaming = handle.options(stream=True, method_name="token_stream", **plain)
            self._streams = TokenStreams(self._card.application, self._inbox, TABLE, streaming.remote)
            self._streams.start()
            self._handle = handle


async def _result(response: Any) -> Any:
    """A coroutine, which can become a task; Serve's responses are only awaitable. Raises the error that is answered."""
    answer = await response
    if isinstance(answer, MantaError):
        raise answer
    return answer


def _tell(queue: ChunkQueue, call: asyncio.Future[Any]) -> None:
    """The call of a request has ended: with an error, or a little before or after its last tokens have come."""
    if (error := _failure(call)) is not None:
        queue.fail(error)
    elif not queue.is_complete:
        late = CoordinatorLost("the model's coordinator has answered, but its last tokens did not come")
        asyncio.get_running_loop().call_later(LAST_TOKENS_S, queue.fail, late)


def _failure(call: asyncio.Future[Any]) -> BaseException | None:
    """Why a call that has ended brought no answer."""
    if call.cancelled():
        return CoordinatorLost("the call of the model's coordinator was cancelled")
    error = call.exception()
    return None if error is None else manta_error(error)


def manta_error(error: BaseException) -> BaseException:
    """What a failed call means to a client; an error that nobody designed stays what it is."""
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, TaskCancelledError, WorkerCrashedError
    from ray.serve.exceptions import (
        BackPressureError,
        DeploymentUnavailableError,
        RayServeException,
        RequestCancelledError,
    )

    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return manta_error(error.cause)
    if isinstance(error, MantaError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("every coordinator's queue is full")
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("the model's coordinator is not available")
    if isinstance(error, RayActorError | WorkerCrashedError | TaskCancelledError | RequestCancelledError):
        return CoordinatorLost("the model's coordinator was lost while it answered")
    if isinstance(error, grpc.aio.AioRpcError) and error.code() in LOST_CODES:
        return CoordinatorLost("the connection to the model's coordinator was lost while it answered")
    if isinstance(error, GetTimeoutError | TimeoutError):
        return Unavailable("the model's coordinator did not answer in time")
    if isinstance(error, RayServeException):
        return Unavailable("the model's application is not running")
    return error
