"""Compiled code that as many threads work through together as the work is worth. Knows no kernel.

A routine takes one array of int64: a counter, and what its kernel wants to know, sizes and addresses. Threads take
items from the counter, or runs of items, until none is left, so none of them waits long for one that was put off its
core. Which thread does an item has no influence on what comes out.

The threads are those of torch's OpenMP: two pools would take the cores from each other. To wake one took 2 microseconds
while it looked for work (`openmp_spin_count`), 20 when it slept (2 cores, virtual). The call itself takes 2.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch

from experts_service.kernels.compiled.jit import AVAILABLE, compile_routine, kernel, seen, take_several

if AVAILABLE:
    from experts_service.kernels.compiled.jit import sched_yield

WAKE_S = 20e-6  # a thread that saves less than this is not woken
READ_BYTES_S = 20e9  # of one thread that reads weights; measured 16 to 29
MULTIPLICATIONS_S = 50e9  # of one thread

_LOOKS = 1000  # at a counter, before a thread gives its core to whoever it may be waiting for

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> Any:
    """GCC's `GOMP_parallel(function, data, threads, flags)`, which torch has loaded; None where it uses another one."""
    run: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if run is not None:
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
    return run


_gomp_parallel = _openmp()


def parallel_address() -> int:
    """Of OpenMP's function that calls another one in several threads; 0: there is none that we know."""
    return 0 if _gomp_parallel is None else int(ctypes.cast(_gomp_parallel, ctypes.c_void_p).value or 0)


class Routine:
    """A function of numba's language. It is compiled when it is run first."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Of its machine code."""
        return compile_routine(self._function)

    @cached_property
    def alone(self) -> Any:
        """To be called with the address of a task: this thread does all of it. The GIL is free meanwhile."""
        return _Function(self.address)

    def load(self) -> None:
        """Compile it now, or read what was compiled."""
        _ = self.alone

    def run(self, num_threads: int, *arguments: int) -> None:
        """Return when all items are done. The GIL is free meanwhile."""
        task = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
        self.run_at(ctypes.addressof(task), num_threads)

    def run_at(self, task: int, num_threads: int) -> None:
        """The same of a counter and arguments that are at an address."""
        if num_threads > 1 and _gomp_parallel is not None:
            _gomp_parallel(self.address, task, num_threads, 0)
        else:
            self.alone(task)


class Task(NamedTuple):
    """What a routine is run with."""

    routine: Routine
    num_threads: int
    arguments: tuple[int, ...]
    keeps: tuple[object, ...] = ()  # what the arguments are addresses of, where nobody else has it
    halts: int = 0  # address of an int64: unless that is 0 afterwards, a chain ends here

    def run(self) -> None:
        """Now, alone."""
        self.routine.run(self.num_threads, *self.arguments)


@kernel
def take_run(task, number, most, threads):  # type: ignore[no-untyped-def]
    """The next of `number` items, first and end: `most` at first, one by one at last; none is left if first ≥ end.

    For items that lie side by side in memory: what a thread reads on in one go comes faster.
    """
    left = number - take_several(task, 0)  # or fewer, if another thread comes in between: then the run is a bit longer
    length = max(1, min(most, left // (2 * threads)))
    first = take_several(task, length)
    return first, min(number, first + length)


@kernel
def wait_for(counted, number):  # type: ignore[no-untyped-def]
    """Return when `number` is counted: what was done before it was is seen from here on."""
    looks = 0
    while seen(counted) < number:
        looks += 1
        if looks % _LOOKS == 0:
            sched_yield()


@kernel
def wait_for_none(counted):  # type: ignore[no-untyped-def]
    """Return when nothing is counted any more: the same."""
    looks = 0
    while seen(counted) != 0:
        looks += 1
        if looks % _LOOKS == 0:
            sched_yield()


def num_threads(nbytes: int, multiplications: int) -> int:
    """How many of the caller's threads (`torch.set_num_threads`) it takes to read so much and to multiply so often.

    The time of n threads is t / n, and n - 1 of them have to be woken: the best is √(t / WAKE_S).
    """
    seconds = max(nbytes / READ_BYTES_S, multiplications / MULTIPLICATIONS_S)
    return max(1, min(torch.get_num_threads(), round(math.sqrt(seconds / WAKE_S))))
