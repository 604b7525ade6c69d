"""Keeps one stream of tokens open from every coordinator of an application, and notices when one falls silent.

Serve's router says which coordinators there are. One that is no longer among them keeps its stream until it has
answered what it was asked, and then loses it, since Serve waits for that before it stops the replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Any

from cluster.messages import HEARTBEAT_S, TokenStream
from gateway.coordinators.table import CoordinatorTable
from gateway.coordinators.token_inbox import TokenInbox

logger = logging.getLogger(__name__)

# So many heartbeats without an item and a coordinator is silent: its requests go on at another one, if there is one.
# Serve would replace it after 30 s, and Ray notices after up to a minute that a node was cut off. A wrong suspicion
# costs a prefill.
SILENT_HEARTBEATS = 5
REOPEN_PAUSE_S = 0.1


class TokenStreams:
    """`open_stream` calls a coordinator: an async iterator of items, with `cancel`."""

    def __init__(
        self, application: str, inbox: TokenInbox, table: CoordinatorTable, open_stream: Callable[[TokenStream], Any]
    ) -> None:
        self._application = application
        self._inbox = inbox
        self._table = table
        self._open_stream = open_stream
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._missed: dict[str, int] = {}  # heartbeats since the last item, by coordinator

    def start(self) -> None:
        """On the event loop on which it is to run."""
        loop = asyncio.get_running_loop()
        # In empty contexts: Serve cancels the calls that were made in a request's context when that request ends.
        self._watch = loop.create_task(self._keep_watch(), context=Context())
        self._stop_listening = self._table.listen(
            self._application, lambda: loop.call_soon_threadsafe(self._open_missing)
        )
        self._open_missing()

    async def close(self) -> None:
        """End all streams; what requests still wait for is lost."""
        self._stop_listening()
        tasks = [self._watch, *self._readers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open_missing(self) -> None:
        for coordinator in sorted(self._table.coordinators(self._application) - self._readers.keys()):
            reader = asyncio.get_running_loop().create_task(self._read(coordinator), context=Context())
            self._readers[coordinator] = reader
            self._missed[coordinator] = 0

    async def _read(self, coordinator: str) -> None:
        try:
            while coordinator in self._table.coordinators(self._application):
                await self._read_one_stream(coordinator)
                self._inbox.lose(coordinator, "the stream of the model's coordinator ended")
                await asyncio.sleep(REOPEN_PAUSE_S)
        finally:
            del self._readers[coordinator], self._missed[coordinator]
            self._table.set_silent(coordinator, False)
            self._inbox.lose(coordinator, "the stream of the model's coordinator was closed")

    async def _read_one_stream(self, coordinator: str) -> None:
        stream = self._open_stream(TokenStream(self._inbox.id, coordinator))
        try:
            async for chunks in stream:
                self._missed[coordinator] = 0
                self._table.set_silent(coordinator, False)
                self._inbox.deliver(chunks)
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # by us, not by its coordinator
                stream.cancel()
                raise
        except Exception as error:
            logger.info("the token stream of %s ended: %s", coordinator, type(error).__name__)

    async def _keep_watch(self) -> None:
        """Counts heartbeats, not seconds: a gateway that was held up itself has missed one, not many."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for coordinator, reader in list(self._readers.items()):
                self._missed[coordinator] += 1
                if self._missed[coordinator] > SILENT_HEARTBEATS:
                    self._table.set_silent(coordinator, True)
                    if self._table.coordinators(self._application) - self._table.silent:  # somebody can go on
                        self._inbox.lose(coordinator, "the model's coordinator is silent")
                departed = coordinator not in self._table.coordinators(self._application)
                if departed and not self._inbox.expects_from(coordinator):
                    reader.cancel()
