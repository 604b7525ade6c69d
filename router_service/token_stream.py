"""Carries token chunks from the engine's thread to one consumer on an event loop. Knows nothing of engine or Serve.

Chunks that arrive while the consumer is busy are joined into one; the consumer is never more than one message behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from cluster.errors import MantaError
from cluster.messages import TokenChunk


class TokenStream:
    """An async iterator of chunks. `put` is called on the consumer's loop; an error or a finished chunk ends it."""

    def __init__(self) -> None:
        self._pending: list[TokenChunk] = []
        self._error: MantaError | None = None
        self._arrived = asyncio.Event()

    def put(self, item: TokenChunk | MantaError) -> None:
        """Add a chunk, or the error that ends the stream."""
        if isinstance(item, MantaError):
            self._error = item
        else:
            self._pending.append(item)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._pending:
                chunks, self._pending = self._pending, []
                joined = join(chunks)
                yield joined
                if joined.finish_reason is not None:
                    return
            if self._error is not None:
                raise self._error


def join(chunks: list[TokenChunk]) -> TokenChunk:
    """One chunk of consecutive ones."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    return replace(
        last,
        first_position=chunks[0].first_position,
        prompt_logprobs=chunks[0].prompt_logprobs,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        routed_experts=(
            None if last.routed_experts is None else b"".join(chunk.routed_experts or b"" for chunk in chunks)
        ),
        logprobs=None if last.logprobs is None else tuple(one for chunk in chunks for one in chunk.logprobs or ()),
    )
