"""Threads that run one compiled kernel side by side. Knows no kernel.

A kernel of this kind is called by several threads at once, without the GIL, and takes units of work from a counter
until none is left. So it does not matter how many of them come, or when.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

_Call = Callable[[], None]


class KernelThreads:
    """The caller's thread and as many others as it takes to be `number`; they end with this object."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._num_helpers = 0
        self._finalizer = weakref.finalize(self, _end, self._calls, number)

    def run(self, kernel: _Call, number: int) -> None:
        """Call it on at most `number` threads, this one among them; all have returned when this does.

        Raises what one of them raises. One caller at a time.
        """
        wanted = min(number, self.number) - 1
        if wanted < 1:
            kernel()
            return
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def call() -> None:
            try:
                kernel()
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

        self._have(wanted)
        for _ in range(wanted):
            self._calls.put(call)
        call()
        called = 1 + wanted
        with suppress(Empty):  # who has not woken up yet need not: nothing is left to do
            while True:
                self._calls.get_nowait()
                called -= 1
        for error in [ended.get() for _ in range(called)]:
            if error is not None:
                raise error

    def _have(self, helpers: int) -> None:
        while self._num_helpers < helpers:
            threading.Thread(target=_serve, args=(self._calls,), name="kernel", daemon=True).start()
            self._num_helpers += 1


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # what it holds is of one step


def _end(calls: SimpleQueue[_Call | None], number: int) -> None:
    for _ in range(number):
        calls.put(None)
