"""One deadline over all waits for a stream, whichever tasks they are in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cluster.deadline import Deadline
from cluster.errors import DeadlineExceeded
from gateway.deadline import DeadlineTimer


async def numbers(pauses_s: list[float], left: list[int]) -> AsyncGenerator[int, None]:
    try:
        for number, pause_s in enumerate(pauses_s):
            await asyncio.sleep(pause_s)
            yield number
    finally:
        left.append(1)


def test_it_ends_a_wait_that_takes_too_long_and_no_other() -> None:
    async def run() -> list[int]:
        left: list[int] = []
        stream = numbers([0, 0, 30], left)
        got = []
        with DeadlineTimer(Deadline.after(1)) as deadline:
            got.append(await deadline.next(stream))
            got.append(await asyncio.ensure_future(deadline.next(stream)))  # another task
            with pytest.raises(DeadlineExceeded):
                await deadline.next(stream)
            with pytest.raises(DeadlineExceeded):
                await deadline.next(stream)
        assert left == [1], "what was waited for is cancelled"
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return got

    assert asyncio.run(run()) == [0, 1]


def test_a_stream_that_ends_in_time_ends_as_it_does() -> None:
    async def run() -> None:
        with DeadlineTimer(Deadline.after(60)) as deadline:
            stream = numbers([0], [])
            assert await deadline.next(stream) == 0
            with pytest.raises(StopAsyncIteration):
                await deadline.next(stream)

    asyncio.run(run())


def test_who_cancels_the_reader_is_obeyed() -> None:
    async def run() -> None:
        with DeadlineTimer(Deadline.after(60)) as deadline:
            reading = asyncio.ensure_future(deadline.next(numbers([30], [])))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(run())


def test_one_that_is_over_before_it_begins() -> None:
    async def run() -> None:
        with DeadlineTimer(Deadline.after(-1)) as deadline, pytest.raises(DeadlineExceeded):
            await deadline.next(numbers([30], []))

    asyncio.run(run())
