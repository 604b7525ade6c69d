"""Coordinators over a Serve DeploymentHandle. Knows Serve's handle and its errors; knows nothing of text or doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Set
from typing import Any

import grpc

from cluster.errors import CoordinatorLost, MantaError, Overloaded, Unavailable
from cluster.messages import Embedding, EngineStats, ModelCard, Request, TokenChunk
from gateway.coordinators.client import StreamingClient, result
from gateway.coordinators.table import TABLE
from gateway.coordinators.token_inbox import TokenInbox
from gateway.coordinators.token_streams import TokenStreams

COORDINATOR = "coordinator"  # the deployment's name inside a model's application
STATS_TIMEOUT_S = 5.0
LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # where replicas talk gRPC to each other


class ServeCoordinatorClient(StreamingClient):
    """Serve picks the replica."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(TokenInbox(TABLE))
        self._card = card
        self._handle: Any = None
        self._generate: Any = None
        self._streams: TokenStreams | None = None

    def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        self._connect()
        return super().generate(request)

    def ask(self, request: Request) -> Any:
        return self._generate.remote(request, self.inbox.id)

    def meaning(self, error: BaseException) -> BaseException:
        return manta_error(error)

    def coordinators(self) -> Set[str]:
        return TABLE.coordinators(self._card.application)

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        self._connect()
        with self.inbox.expect(requests[0]) as queue:  # no token comes, only word that the coordinator is lost
            response = self._handle.embed.remote(requests)
            call = asyncio.ensure_future(result(response))
            call.add_done_callback(self.failure)  # else asyncio logs a stack for each one that nobody waits for
            loss = asyncio.ensure_future(queue.failure())
            try:
                await asyncio.wait((call, loss), return_when=asyncio.FIRST_COMPLETED)
                if (error := self.failure(call) if call.done() else await loss) is not None:
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
            self._streams = TokenStreams(self._card.application, self.inbox, TABLE, streaming.remote)
            self._streams.start()
            self._handle = handle


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
        return Overloaded("every coordinator's queue is full", reason="shed_queue")
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
