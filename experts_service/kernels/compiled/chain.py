"""Routines one after the other, in one call. Knows tasks; knows no kernel.

Between two calls a thread is sent to sleep and woken again, and the interpreter finds cold caches after weights have
been read.

Each begins when all items of the one before are done, and nobody is waited for who has none of them:

    threads inside     +1 →  a routine takes items and does them, until none is left  → -1, then wait for 0

1.  Who comes back from a routine found no item left, so each was taken, by somebody who was counted as inside before
    and is until it is done. Counters are added to in one order that all threads agree on, with all that was written
    before. So where nobody is inside any more all items are done, and what they wrote is seen.
2.  A thread that comes late finds nothing to take, and those that went on do not look back.
3.  No wait is for ever. A thread waits for those that are inside one routine. They wait for nobody outside it, and
    inside, if at all, for items that were taken by others inside (as `_networks` does), who do them without waiting. So
    the thread that is furthest behind never waits for one that waits for it. Each thread enters each routine once, so
    nobody keeps coming back.
4.  What halts a chain is written inside the routine that does, and by nobody until it goes on: all threads see the
    same.
5.  Who waits gives its core away now and then, so more threads than cores get on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from experts_service.kernels.compiled.jit import AVAILABLE, call, counter, pointer, take_several
from experts_service.kernels.compiled.routine import Routine, Task, wait_for_none

if AVAILABLE:
    from numba import carray

# The memory of all begins with a counter that is not used, the first that is run, and how many there are; then come
# of each its address, its place, and where it says whether it halts, or 0.
_FIRST, _NUMBER, _HEADER = 1, 2, 3
_COLUMNS = 3
_LINE = 8  # int64 of a cache line: a task begins with one, so that counters of two are not in the same


class Chain:
    """Tasks that are run one after the other, once or again and again: threads are woken once for all."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """What their arguments are the addresses of has to stay where it is; what a task keeps does."""
        self._tasks = tuple(tasks)
        self._threads = max(task.num_threads for task in tasks)
        self._halts = [
            (index, ctypes.c_int64.from_address(task.halts)) for index, task in enumerate(tasks) if task.halts
        ]
        self._first = 0
        header: list[int] = [0, 0, len(tasks)]
        rest: list[int] = []
        start = _lines(_HEADER + _COLUMNS * len(tasks))
        for task in tasks:
            header += (task.routine.address, start + len(rest), task.halts)
            of_task = (0, 0, *task.arguments)  # who is inside, and the counter that each task begins with
            rest += of_task
            rest += [0] * (_lines(len(of_task)) - len(of_task))
        self._fresh = np.array([*header, *[0] * (start - len(header)), *rest], np.int64)
        memory = np.empty(len(self._fresh) + _LINE, np.int64)
        begin = -memory.ctypes.data // memory.itemsize % _LINE
        self._memory = memory[begin : begin + len(self._fresh)]
        self._address = self._memory.ctypes.data

    @property
    def place(self) -> tuple[int, int, int, int]:
        """For compiled code that runs it, which copies it first as it was made: its address, that of the copy's
        original, their bytes, and its threads. Only where nothing halts it.
        """
        assert not self._halts
        return self._address, self._fresh.ctypes.data, self._fresh.nbytes, self._threads

    def run(self, num_threads: int = 1) -> bool:
        """Return when all are done, or at one that halts: whether one did. One caller at a time.

        `num_threads`: or more, where the tasks were made for more.
        """
        self._first = 0
        return self._run(num_threads)

    def go_on(self, num_threads: int = 1) -> bool:
        """Do what comes after the one that halted. The same."""
        return self._run(num_threads)

    def _run(self, num_threads: int) -> bool:
        self._memory[:] = self._fresh
        self._memory[_FIRST] = self._first
        _run_all.run_at(self._address, max(self._threads, num_threads))
        for index, said in self._halts:
            if index >= self._first and said.value:
                self._first = index + 1
                return True
        return False

    @staticmethod
    def load() -> None:
        """Compile what runs them, or read what was compiled."""
        _run_all.load()

    @staticmethod
    def runner() -> int:
        """The address of what runs any, given its own."""
        return _run_all.address


def _lines(numbers: int) -> int:
    """As many, or more: whole cache lines."""
    return -(-numbers // _LINE) * _LINE


@Routine
def _run_all(task):  # type: ignore[no-untyped-def]
    """Function after function, each with its own task."""
    for index in range(task[_FIRST], task[_NUMBER]):
        at = _HEADER + _COLUMNS * index
        function, place, halts = task[at], task[at + 1], task[at + 2]
        inside = counter(task, place)
        take_several(inside, 1)
        call(function, counter(task, place + 1))
        take_several(inside, -1)
        wait_for_none(inside)  # type: ignore[no-untyped-call]
        if halts != 0 and carray(pointer(halts), 1, np.int64)[0] != 0:
            return
