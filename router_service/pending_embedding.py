"""Carries one embedding from the engine's thread to whoever awaits it. Knows nothing of engine or Serve."""

from __future__ import annotations

import asyncio

from cluster.errors import MantaError
from cluster.messages import Embedding


class PendingEmbedding:
    """Awaitable once. `put` is called on the consumer's loop, as that of OutgoingTokens."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()

    def put(self, item: Embedding | MantaError) -> None:
        """The embedding, or the error there is instead."""
        if self._answer.done():
            return
        if isinstance(item, MantaError):
            self._answer.set_exception(item)
        else:
            self._answer.set_result(item)

    async def get(self) -> Embedding:
        """Raises MantaError."""
        return await self._answer
