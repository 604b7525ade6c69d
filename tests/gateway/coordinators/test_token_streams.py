"""One stream per coordinator: opened when it comes, kept while it owes answers, and listened to for its silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cluster.errors import CoordinatorLost
from cluster.messages import Request, SamplingParams, TokenChunk, TokenStream
from gateway.coordinators import token_streams
from gateway.coordinators.table import CoordinatorTable
from gateway.coordinators.token_inbox import TokenInbox
from gateway.coordinators.token_streams import SILENT_HEARTBEATS, TokenStreams

HEARTBEAT_S = 0.02
REQUEST = Request("a", (1, 2), SamplingParams(max_tokens=20), 7)


class Stream:
    """What a call of a coordinator returns; `None` in `items` ends it."""

    def __init__(self, asked: TokenStream) -> None:
        self.asked = asked
        self.items: asyncio.Queue[tuple[TokenChunk, ...] | BaseException | None] = asyncio.Queue()
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[tuple[TokenChunk, ...]]:
        while (item := await self.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Gateway:
    """An inbox with its streams, and those that were opened."""

    def __init__(self) -> None:
        self.table = CoordinatorTable()
        self.inbox = TokenInbox(self.table)
        self.opened: list[Stream] = []
        self.streams = TokenStreams("app", self.inbox, self.table, self.open)

    def open(self, asked: TokenStream) -> Stream:
        self.opened.append(Stream(asked))
        return self.opened[-1]


def running(test: Callable[[Gateway], Awaitable[None]]) -> None:
    async def run() -> None:
        gateway = Gateway()
        gateway.streams.start()
        try:
            async with asyncio.timeout(20):
                await test(gateway)
        finally:
            await gateway.streams.close()
        assert gateway.streams._readers == {}

    asyncio.run(run())


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(token_streams, "REOPEN_PAUSE_S", 0.01)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(HEARTBEAT_S / 4)


def test_every_coordinator_has_a_stream_for_this_gateway() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.table.publish("app", ["north", "south"])
        gateway.table.publish("other", ["elsewhere"])
        await until(lambda: len(gateway.opened) == 2)
        gateway.table.publish("app", ["north", "south", "west"])
        await until(lambda: len(gateway.opened) == 3)
        assert {stream.asked.coordinator for stream in gateway.opened} == {"north", "south", "west"}
        assert {stream.asked.gateway for stream in gateway.opened} == {gateway.inbox.id}

    running(test)


def test_a_silent_coordinator_is_lost_and_avoided_until_it_is_heard_again() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.table.publish("app", ["north", "south"])
        await until(lambda: len(gateway.opened) == 2)
        north, south = sorted(gateway.opened, key=lambda stream: stream.asked.coordinator)

        async def beat() -> None:
            while True:
                south.items.put_nowait(())
                await asyncio.sleep(HEARTBEAT_S / 2)

        beating = asyncio.create_task(beat())
        with gateway.inbox.expect(REQUEST) as queue:
            gateway.table.sent(REQUEST.key, "north")
            started = asyncio.get_running_loop().time()
            with pytest.raises(CoordinatorLost, match="silent"):
                await anext(aiter(queue))
            assert asyncio.get_running_loop().time() - started >= (SILENT_HEARTBEATS - 1) * HEARTBEAT_S
        assert gateway.table.silent == {"north"}
        north.items.put_nowait(())
        await until(lambda: gateway.table.silent == frozenset())
        beating.cancel()
        assert not north.cancelled, "it goes on where it is heard again"

    running(test)


def test_a_silent_coordinator_is_waited_for_until_there_is_another() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.table.publish("app", ["north"])
        await until(lambda: gateway.opened)
        with gateway.inbox.expect(REQUEST) as queue:
            gateway.table.sent(REQUEST.key, "north")
            reading = asyncio.create_task(anext(aiter(queue)))
            await until(lambda: gateway.table.silent)
            await asyncio.sleep(3 * HEARTBEAT_S)
            assert not reading.done(), "nobody else could go on"
            gateway.table.publish("app", ["north", "south"])
            with pytest.raises(CoordinatorLost, match="silent"):
                await reading

    running(test)


@pytest.mark.parametrize("end", [None, ValueError("broken"), asyncio.CancelledError()])
def test_a_broken_stream_loses_its_requests_and_is_opened_again(end: BaseException | None) -> None:
    async def test(gateway: Gateway) -> None:
        gateway.table.publish("app", ["north"])
        await until(lambda: gateway.opened)
        with gateway.inbox.expect(REQUEST) as queue:
            gateway.table.sent(REQUEST.key, "north")
            gateway.opened[0].items.put_nowait(end)
            with pytest.raises(CoordinatorLost, match="ended"):
                await anext(aiter(queue))
        await until(lambda: len(gateway.opened) == 2)
        with gateway.inbox.expect(REQUEST) as queue:
            gateway.opened[1].items.put_nowait((TokenChunk("a", 0, 0, (5,)),))
            assert (await anext(aiter(queue))).token_ids == (5,)

    running(test)


def test_a_coordinator_that_drains_keeps_its_stream_until_it_has_answered() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.table.publish("app", ["north", "south"])
        await until(lambda: len(gateway.opened) == 2)
        north, south = sorted(gateway.opened, key=lambda stream: stream.asked.coordinator)
        with gateway.inbox.expect(REQUEST) as queue:
            gateway.table.sent(REQUEST.key, "north")
            gateway.table.publish("app", ["south"])
            await asyncio.sleep(3 * HEARTBEAT_S)
            north.items.put_nowait((TokenChunk("a", 0, 0, (5,), finish_reason="stop"),))
            assert [chunk.token_ids async for chunk in queue] == [(5,)]
        await until(lambda: north.cancelled)
        assert not south.cancelled
        await asyncio.sleep(5 * HEARTBEAT_S)
        assert len(gateway.opened) == 2, "it is not asked again"

    running(test)
