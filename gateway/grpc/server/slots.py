"""Bounds how many messages are being read at a time. Knows tenants and time; not what is read.

gRPC does not say how large a message is before all of it is there, so each that is being read counts as the largest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import islice
from weakref import WeakValueDictionary

from cluster.errors import BodyTimeout, Overloaded
from cluster.fairness import is_refused


class ReadSlots:
    """`bound` messages at a time, a quarter of them of one tenant.

    `max_waiting` wait for their turn; those of who has most waiting are refused first. While some wait for others, as
    many messages as wait have `grace_s` in all to be complete, from the oldest on: those who are slow hold up nobody.
    """

    def __init__(self, bound: int, max_waiting: int, timeout_s: float, grace_s: float) -> None:
        self._bound = bound
        self._room = asyncio.Semaphore(bound)
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._reading: dict[asyncio.Timeout, float] = {}  # and since when, the oldest first
        self._waiting: Counter[str] = Counter()  # by tenant, for their own turn or for any
        self._num_waiting = 0  # for any

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncGenerator[None, None]:
        """Around the reading of one message. Raises Overloaded, and BodyTimeout in it where that takes too long."""
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = asyncio.Semaphore(max(1, self._bound // 4))
        await self._wait(tenant, own)
        try:
            async with asyncio.timeout(self._timeout_s) as reading:
                self._reading[reading] = asyncio.get_running_loop().time()
                self._hurry()
                try:
                    yield
                finally:
                    del self._reading[reading]
        except TimeoutError:
            raise BodyTimeout("the message was not complete in time") from None
        finally:
            self._room.release()
            own.release()

    async def _wait(self, tenant: str, own: asyncio.Semaphore) -> None:
        """Until it is the tenant's turn, who has taken a place of its `own` and one of all then."""
        if is_refused(self._waiting, tenant, self._max_waiting):
            raise Overloaded("too many messages wait to be read; try again later", reason="shed_messages")
        self._waiting[tenant] += 1
        try:
            await own.acquire()
            try:
                await self._wait_for_room()
            except BaseException:
                own.release()
                raise
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def _wait_for_room(self) -> None:
        self._num_waiting += 1
        try:
            if self._room.locked():
                self._hurry()
            await self._room.acquire()
        finally:
            self._num_waiting -= 1

    def _hurry(self) -> None:
        for reading, since in islice(self._reading.items(), self._num_waiting):
            when = reading.when()
            if when is not None and when > since + self._grace_s:
                reading.reschedule(since + self._grace_s)
