"""Takes what coordinators send and gives each request its own tokens. Knows neither Serve nor text.

    stream of coordinator a ──▶ deliver ──▶ ChunkQueue of request 1 ──▶ chunk, chunk, …
    stream of coordinator b ──▶ deliver ──▶ ChunkQueue of request 2 ──▶ chunk, CoordinatorLost

Chunks that come while their reader is busy are joined, up to MAX_JOINED tokens: what a client did not read for minutes
is not worked through in one go. Past MAX_UNREAD_BYTES the call is cancelled, and the rest asked for once that is read,
as if the coordinator had been lost. A request ends with its last chunk, with an error of its call, or with
CoordinatorLost when its coordinator is. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager

from cluster.errors import CoordinatorLost
from cluster.messages import Key, Request, TokenChunk
from cluster.token_chunks import join, num_bytes
from gateway.coordinators.table import CoordinatorTable

MAX_JOINED = 64
# Of one client request, all choices together, pickled; in memory three times as much. Scores of a prompt do not count:
# they have a bound of their own, and none is read before the first token.
MAX_UNREAD_BYTES = 2**26


class ChunkQueue:
    """An async iterator over the chunks of one request, whose positions have no gap and no overlap."""

    def __init__(self, request: Request) -> None:
        self.is_complete = False  # the last chunk has arrived
        self.on_overflow: Callable[[], object] = lambda: None  # what still comes is not taken
        self._next_position = len(request.output_token_ids)
        self._chunks: list[TokenChunk] = []
        self._unread_bytes = 0
        self._most_unread = MAX_UNREAD_BYTES // (1 + request.num_siblings)
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        """Chunks after the end are ignored."""
        if self.is_complete or self._error is not None:
            return
        if chunk.first_position != self._next_position:
            self.fail(CoordinatorLost(f"token {self._next_position} did not come, but {chunk.first_position}"))
            return
        self._next_position += len(chunk.token_ids)
        self.is_complete = chunk.finish_reason is not None
        self._chunks.append(chunk)
        self._unread_bytes += _weight(chunk)
        if chunk.token_ids or self.is_complete:  # else there is more to come of the prompt
            self._arrived.set()
        if self._unread_bytes > self._most_unread and not self.is_complete:
            self.fail(CoordinatorLost("more has come than the client has read"))
            self.on_overflow()

    def fail(self, error: BaseException) -> None:
        """Raise this to the reader, after what has arrived. A complete answer stays complete."""
        if not self.is_complete and self._error is None:
            self._error = error
            self._arrived.set()

    async def failure(self) -> BaseException:
        """What `fail` is given, as soon as it is. For one who expects no chunks."""
        while self._error is None:
            await self._arrived.wait()
            self._arrived.clear()
        return self._error

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._chunks and (self._chunks[-1].token_ids or self.is_complete):
                chunks = self._take()
                yield join(chunks)
                if chunks[-1].finish_reason is not None:
                    return
                if self._chunks:
                    await asyncio.sleep(0)  # others have their turn
            if self._error is not None:
                raise self._error

    def _take(self) -> list[TokenChunk]:
        """The oldest chunks, and as many as have MAX_JOINED tokens; those without any belong to the next."""
        num_tokens = end = 0
        while end < len(self._chunks) and num_tokens < MAX_JOINED:
            num_tokens += len(self._chunks[end].token_ids)
            end += 1
        taken, self._chunks = self._chunks[:end], self._chunks[end:]
        self._unread_bytes -= sum(map(_weight, taken))
        return taken


def _weight(chunk: TokenChunk) -> int:
    return num_bytes(chunk) if chunk.prompt_logprobs is None else 0


class TokenInbox:
    """The queues of one gateway's requests to the coordinators of one application."""

    def __init__(self, table: CoordinatorTable, inbox_id: str = "") -> None:
        self.id = inbox_id or uuid.uuid4().hex
        self._table = table
        self._queues: dict[Key, ChunkQueue] = {}

    @contextmanager
    def expect(self, request: Request) -> Iterator[ChunkQueue]:
        """Take what comes for a request that is sent in here; what comes later is ignored."""
        queue = self._queues[request.key] = ChunkQueue(request)
        self._table.expect(request.key)
        try:
            yield queue
        finally:
            del self._queues[request.key]
            self._table.forget(request.key)

    def deliver(self, chunks: Iterable[TokenChunk]) -> None:
        """One item of a coordinator's stream."""
        for chunk in chunks:
            queue = self._queues.get(chunk.key)
            if queue is not None:
                queue.put(chunk)

    def lose(self, coordinator: str, reason: str) -> None:
        """Nothing more is to be expected of a coordinator for what it was asked."""
        for key, queue in self._queues.items():
            if self._table.place(key) == coordinator:
                queue.fail(CoordinatorLost(reason))

    def expects_from(self, coordinator: str) -> bool:
        """Whether a coordinator still owes an answer."""
        return any(
            not queue.is_complete and self._table.place(key) == coordinator for key, queue in self._queues.items()
        )
