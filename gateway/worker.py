"""Where work is done that grows with a body or an answer: small ones at once, larger ones beside the event loop.

Knows callers and sizes; knows not what the work is. A caller has one thread at a time, so one caller's large bodies
keep nobody else's waiting, and few threads compete with the event loop for the interpreter. One of the threads takes no
long work: several callers' large bodies do not keep others' smaller ones waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from gateway.admission.caller import current_caller

INLINE_BYTES = 8192
LONG_BYTES = 128 * 1024  # what is larger takes a tenth of a second and more, as text to be tokenized
NUM_THREADS = 4

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Worker:
    """A few threads. A gateway replica has one of these for bodies and one for answers."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, name)
        self._turns: dict[str, asyncio.Lock] = {}  # by the caller's id
        self._long = asyncio.Semaphore(NUM_THREADS - 1)

    async def run(self, num_bytes: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `work` returns or raises; `num_bytes` is the size of what it works on."""
        if num_bytes <= INLINE_BYTES:
            return work(*args, **kwargs)
        return await self.run_beside(num_bytes, work, *args, **kwargs)

    async def run_beside(self, num_bytes: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """As `run`, and beside the event loop however small it is."""
        loop = asyncio.get_running_loop()
        turn = self._turns.setdefault(current_caller().id, asyncio.Lock())
        held = contextlib.ExitStack()
        with held:
            await turn.acquire()
            held.callback(turn.release)
            if num_bytes > LONG_BYTES:
                await self._long.acquire()
                held.callback(self._long.release)
            context = copy_context()
            working = self._threads.submit(lambda: context.run(work, *args, **kwargs))
            release = held.pop_all().close

        def release_both(_future: Future[_T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(release)

        working.add_done_callback(release_both)  # and not before, whatever becomes of who waits
        return await asyncio.wrap_future(working)
