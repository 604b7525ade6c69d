"""Carries the tokens of all requests of one gateway to it, a step's in one item. Knows nothing of engine or Serve.

    engine's step ──▶ OutgoingTokens of each request ──▶ TokenOutbox ──▶ (chunk, chunk, …) ──▶ the gateway's TokenInbox

Chunks that come while the gateway is behind are joined, choice by choice: it is never more than one item behind. All
of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from cluster.errors import CoordinatorLost, MantaError
from cluster.messages import HEARTBEAT_S, Key, TokenChunk
from cluster.token_chunks import cut, join, num_bytes

ITEM_BYTES = 2**20  # roughly, of one item; gRPC between replicas ends a stream at one of 4 MiB
READERLESS_S = 10.0  # then nobody waits for these tokens any more; a gateway opens a broken stream again at once


class OutgoingTokens:
    """What one request is told; `sent` waits for its end."""

    def __init__(self, outbox: TokenOutbox) -> None:
        self.num_tokens = 0
        self._outbox = outbox
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, item: TokenChunk | MantaError) -> None:
        """Send a chunk, or end with an error; so does the chunk with a finish reason, without."""
        if isinstance(item, MantaError):
            if not self._end.done():
                self._end.set_exception(item)
            return
        self.num_tokens += len(item.token_ids)
        self._outbox.put(item)
        if item.finish_reason is not None and not self._end.done():
            self._end.set_result(None)

    async def sent(self) -> None:
        """Return when the last chunk is on its way. Raises MantaError."""
        await self._end


class TokenOutbox:
    """The way to one gateway: its requests put chunks in, and one reader at a time takes items out."""

    def __init__(self, on_abandoned: Callable[[], object]) -> None:
        """`on_abandoned` is called once nobody has read for READERLESS_S; its requests have been ended then."""
        self._on_abandoned = on_abandoned
        self._pending: list[TokenChunk] = []
        self._arrived = asyncio.Event()
        self._outgoing: dict[Key, OutgoingTokens] = {}
        self._reader: object | None = None
        self._expect_reader()

    @contextmanager
    def outgoing(self, key: Key) -> Iterator[OutgoingTokens]:
        """The way out of one request's tokens; what has not left when it fails or is cancelled never does."""
        self._outgoing[key] = OutgoingTokens(self)
        try:
            yield self._outgoing[key]
        except BaseException:
            self._pending = [chunk for chunk in self._pending if chunk.key != key]
            raise
        finally:
            del self._outgoing[key]

    def put(self, chunk: TokenChunk) -> None:
        """Called by OutgoingTokens."""
        self._pending += cut(chunk, ITEM_BYTES)
        self._arrived.set()

    async def items(self) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        """What is there, again and again: an empty item at once and as heartbeat. Ends when another reader comes."""
        reader = self._reader = object()
        self._give_up.cancel()
        loop = asyncio.get_running_loop()
        try:
            yield ()
            while True:
                heartbeat = loop.call_later(HEARTBEAT_S, self._arrived.set)
                try:
                    await self._arrived.wait()
                finally:
                    heartbeat.cancel()
                if self._reader is not reader:
                    return
                self._arrived.clear()
                yield self._take()
        finally:
            if self._reader is reader:
                self._reader = None
                self._expect_reader()

    def _take(self) -> tuple[TokenChunk, ...]:
        """What has come first and fits into one item; the rest is for the next."""
        if not self._pending:
            return ()
        size, number = 0, 0
        for chunk in self._pending:
            size += num_bytes(chunk)
            if size > ITEM_BYTES and number:
                self._arrived.set()
                break
            number += 1
        taken, self._pending = self._pending[:number], self._pending[number:]
        choices: dict[Key, list[TokenChunk]] = {}
        for chunk in taken:
            choices.setdefault(chunk.key, []).append(chunk)
        return tuple(join(chunks) for chunks in choices.values())

    def _expect_reader(self) -> None:
        self._give_up = asyncio.get_running_loop().call_later(READERLESS_S, self._abandon)

    def _abandon(self) -> None:
        self._on_abandoned()
        for outgoing in self._outgoing.values():
            outgoing.put(CoordinatorLost("the gateway does not read what it asked for"))


class TokenOutboxes:
    """One outbox per gateway, until the gateway has left for good."""

    def __init__(self) -> None:
        self._outboxes: dict[str, TokenOutbox] = {}

    def of(self, gateway: str) -> TokenOutbox:
        """The gateway's outbox, whether it reads already or not: requests may come before their stream does."""
        outbox = self._outboxes.get(gateway)
        if outbox is None:
            outbox = self._outboxes[gateway] = TokenOutbox(lambda: self._outboxes.pop(gateway))
        return outbox
