"""The Serve deployment around an engine: loads, connects to the experts, streams tokens. Knows no door and no maths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cluster.config import ModelConfig
from cluster.messages import EngineStats, Request, TokenChunk
from cluster.placement import ExpertGroup
from router_service.token_stream import TokenStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from router_service.engine import Event, Key


class Coordinator:
    """One replica: attention, gate and KV cache of a model, and the lanes to its experts."""

    async def __init__(
        self,
        model: ModelConfig,
        directory: str,
        fingerprint: str,
        groups: tuple[ExpertGroup, ...],
        *experts: DeploymentHandle,
    ) -> None:
        """Returns once it can serve: Serve calls the replica ready then. Raises SetupError."""
        self._loop = asyncio.get_running_loop()
        self._streams: dict[Key, TokenStream] = {}
        raise NotImplementedError

    async def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        """Stream the tokens of one choice. Closing the stream aborts the sequence; raises MantaError."""
        stream = TokenStream()
        self._streams[request.key] = stream
        try:
            self._engine.submit(request)
            async for chunk in stream:
                yield chunk
        finally:
            del self._streams[request.key]
            self._engine.abort(request.key)

    async def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Called by Serve; raises EngineDead when only a new process can help."""
        self._engine.check_alive()

    def _deliver(self, events: list[Event]) -> None:
        """On the engine's thread, once a step: hand its results to the event loop in one call."""
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[Event]) -> None:
        for key, item in events:
            stream = self._streams.get(key)
            if stream is not None:  # else its consumer has just left
                stream.put(item)
