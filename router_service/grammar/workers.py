"""The threads that follow grammars, token by token, while the model computes. Knows which grammars are slow, not why.

xgrammar gives the interpreter free while it works, so a step goes on beside it. A grammar that was slow once has its
work done in threads of low priority from then on: a hostile schema delays only other slow ones.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

_Result = TypeVar("_Result")
_NUM_THREADS = max(1, (os.cpu_count() or 1) // 4)  # of either kind
_SLOW_S = 0.005  # CPU time of one token; most take a twentieth of it


class GrammarWorkers:
    """Quick and slow threads."""

    def __init__(self, token_timeout_s: float) -> None:
        self.token_timeout_s = token_timeout_s
        self._quick = ThreadPoolExecutor(_NUM_THREADS, "grammar-token")
        self._slow = ThreadPoolExecutor(_NUM_THREADS, "grammar-slow-token", initializer=yield_to_others)
        self._slow_grammars: weakref.WeakValueDictionary[int, CompiledGrammar] = weakref.WeakValueDictionary()  # by id

    def submit(self, compiled: CompiledGrammar, work: Callable[[], _Result]) -> Future[_Result]:
        """Have work done that follows a grammar."""
        return (self._slow if id(compiled) in self._slow_grammars else self._quick).submit(work)

    def note_cost(self, compiled: CompiledGrammar, seconds: float) -> None:
        """One token of a grammar took so much CPU time. Called from any thread."""
        if seconds > _SLOW_S:
            self._slow_grammars[id(compiled)] = compiled

    def close(self) -> None:
        """End the threads, once what they are at has ended."""
        for pool in (self._quick, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)


def yield_to_others() -> None:
    """This thread runs when engine and experts leave it time."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
