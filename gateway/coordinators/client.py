"""How the gateway calls a coordinator: a call per request, and the tokens of all in one stream. Knows no Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Set
from typing import Any, Protocol

from cluster.errors import CoordinatorLost, ExpertUnavailable, MantaError
from cluster.messages import Embedding, EngineStats, Request, TokenChunk
from gateway.coordinators.token_inbox import ChunkQueue, TokenInbox

LAST_TOKENS_S = 5.0  # that tokens may come after the call has returned which sent them


class Generating(Protocol):
    """One model's coordinators, as answers come from them. Closing a stream early aborts the sequence."""

    def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        """Chunks of one choice. Raises MantaError."""


class CoordinatorClient(Generating, Protocol):
    """One model's coordinators."""

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        """The embedding of each prompt, in order; cancelling aborts them. Raises MantaError."""

    async def stats(self) -> EngineStats:
        """A snapshot of one coordinator. Raises MantaError."""


class StreamingClient:
    """A call of `generate` lasts as long as its sequence and returns nothing: tokens come in a coordinator's stream."""

    def __init__(self, inbox: TokenInbox) -> None:
        self.inbox = inbox

    def ask(self, request: Request) -> Any:
        """Begin the call: something that can be awaited, and cancelled with `cancel`."""
        raise NotImplementedError

    def meaning(self, error: BaseException) -> BaseException:
        """What a failed call means to a client; an error that nobody designed stays what it is."""
        raise NotImplementedError

    def coordinators(self) -> Set[str]:
        """Those of the model that take requests, silent ones among them."""
        raise NotImplementedError

    async def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        with self.inbox.expect(request) as queue:
            response = self.ask(request)
            call = asyncio.create_task(result(response))
            queue.on_overflow = lambda: call.done() or response.cancel()
            call.add_done_callback(lambda call: self._tell(queue, call))
            try:
                async for chunk in queue:
                    yield chunk
            finally:
                if not (queue.is_complete or call.done()):
                    response.cancel()

    def failure(self, call: asyncio.Future[Any]) -> BaseException | None:
        """Why a call that has ended brought no answer."""
        if call.cancelled():
            return CoordinatorLost("the call of the model's coordinator was cancelled")
        error = call.exception()
        if error is None:
            return None
        error = self.meaning(error)
        if isinstance(error, ExpertUnavailable):
            # A silent one counts: where this gateway is cut off from it, that is not for ever.
            error.elsewhere = bool(self.coordinators() - {error.coordinator})
        return error

    def _tell(self, queue: ChunkQueue, call: asyncio.Future[Any]) -> None:
        """The call of a request has ended: with an error, or a little before or after its last tokens have come."""
        if (error := self.failure(call)) is not None:
            queue.fail(error)
        elif not queue.is_complete:
            late = CoordinatorLost("the model's coordinator has answered, but its last tokens did not come")
            asyncio.get_running_loop().call_later(LAST_TOKENS_S, queue.fail, late)


async def result(response: Any) -> Any:
    """A coroutine, which can become a task; Serve's responses are only awaitable. Raises the error that is answered."""
    answer = await response
    if isinstance(answer, MantaError):
        raise answer
    return answer
