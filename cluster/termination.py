"""What a replica does on SIGTERM: nothing new comes to it, and it ends once its streams have. Knows Ray's core.

    SIGTERM ─▶ check_health fails ─▶ Serve starts another replica and sends nothing more to this one
            └▶ Serve's own drain ──▶ its streams have ended, or the grace is over ─▶ the process ends

Ray ends a worker at once: its handler raises SystemExit in the main thread. Python lets only that thread set another
one, and a replica runs in none of ours. faulthandler's, which writes into a pipe, may be set from any.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
from collections.abc import Callable

from cluster.errors import Unavailable

logger = logging.getLogger(__name__)

LINGER_S = 5.0  # for Serve to end the process itself, once its streams have ended


class Termination:
    """Of one replica; to be made on its event loop."""

    def __init__(
        self, grace_s: float, on_begin: Callable[[], object] = lambda: None, *, serve_sees_it_s: float = 0.0
    ) -> None:
        """After `grace_s` the process ends, whatever still runs. `on_begin` is called on SIGTERM.

        The drain begins when Serve says so, or after `serve_sees_it_s`. Where it ends, what a proxy still sends is
        lost, so it is not to begin before the proxies hear of it.
        """
        self._grace_s = grace_s
        self._serve_sees_it_s = serve_sees_it_s
        self._on_begin = on_begin
        self._drain: asyncio.Task[None] | None = None
        self._pipe, writing = os.pipe()
        faulthandler.register(signal.SIGTERM, file=writing, all_threads=False, chain=False)
        asyncio.get_running_loop().add_reader(self._pipe, self._begin)

    def check(self) -> None:
        """For a replica's check_health. Raises Unavailable once SIGTERM has come."""
        if self._drain is not None:
            raise Unavailable("this process was told to end, and ends once its requests have")

    def _begin(self) -> None:
        os.read(self._pipe, 65_536)
        if self._drain is None:
            logger.warning("SIGTERM: the process ends once its requests have, after %g s at the latest", self._grace_s)
            self._drain = asyncio.create_task(self._end())
            self._on_begin()

    async def _end(self) -> None:
        import ray

        try:
            async with asyncio.timeout(self._grace_s):
                await asyncio.sleep(self._serve_sees_it_s)
                await ray.get_runtime_context().current_actor.perform_graceful_shutdown.remote()
                await asyncio.sleep(LINGER_S)
        except Exception:
            logger.exception("the process ends before its requests have")
        finally:
            os._exit(0)
