"""Ends the waits of one request at its deadline, with one timer for all. Knows tasks and streams; knows no request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from cluster.deadline import Deadline
from cluster.errors import DeadlineExceeded

PASSED = "the request's deadline passed before it was complete"
_T = TypeVar("_T")


class DeadlineTimer:
    """A context manager. Its waits come one after the other, each in whichever task reads the stream then.

    `asyncio.timeout` is of one task and sets a timer for each wait, which costs more than a token's own work.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._passed = False
        self._waiting: asyncio.Task[Any] | None = None

    def __enter__(self) -> DeadlineTimer:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, self._deadline.at - loop.time()), self._end)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def is_over(self) -> bool:
        return self._passed

    async def next(self, stream: AsyncGenerator[_T, None]) -> _T:
        """The stream's next item. Raises StopAsyncIteration at its end, and DeadlineExceeded."""
        task = asyncio.current_task()
        assert task is not None, "this is a coroutine"
        if self.is_over():
            raise DeadlineExceeded(PASSED)
        cancelling = task.cancelling()
        self._waiting = task
        try:
            return await anext(stream)
        except asyncio.CancelledError:
            if self.is_over() and task.uncancel() <= cancelling:
                raise DeadlineExceeded(PASSED) from None
            raise
        finally:
            self._waiting = None

    def _end(self) -> None:
        self._passed = True
        if self._waiting is not None:
            self._waiting.cancel()
