"""A stream that its reader drops is cancelled where it waits, wherever the reader left it."""

from __future__ import annotations

import asyncio
import gc

import pytest

from gateway.grpc.cancellation import cancelled_when_dropped


class Call:
    """Like a call of Serve's: only a cancellation while it waits for a message ends the work behind it."""

    def __init__(self) -> None:
        self.cancelled = False

    async def stream(self, _request, _context):
        for i in range(1000):
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            yield i


async def read_whole(call):
    return [i async for i in cancelled_when_dropped(call.stream)(None, None)]


async def drop_between_messages(call):
    stream = cancelled_when_dropped(call.stream)(None, None)
    await anext(stream)
    del stream
    gc.collect()
    await asyncio.sleep(0.1)


async def cancel_while_writing(call):
    async def serve():
        async for _ in cancelled_when_dropped(call.stream)(None, None):
            await asyncio.sleep(60)

    await cancel_soon(serve())


async def cancel_while_waiting(call):
    async def serve():
        async for _ in cancelled_when_dropped(call.stream)(None, None):
            pass

    await cancel_soon(serve())


async def cancel_soon(work):
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait((task,))
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("leave", [drop_between_messages, cancel_while_writing, cancel_while_waiting])
def test_a_dropped_stream_is_cancelled(leave):
    call = Call()
    asyncio.run(leave(call))
    assert call.cancelled


def test_a_stream_that_is_read_to_its_end_is_not():
    call = Call()
    assert asyncio.run(read_whole(call)) == list(range(1000))
    assert not call.cancelled
