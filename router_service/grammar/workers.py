"""The threads that follow grammars, token by token, while the model computes. Knows which grammars are slow, not why.

xgrammar gives the interpreter free while it works, so a step goes on beside it. A grammar that was slow once has its
work done in threads of low priority from then on: a hostile schema delays only other slow ones. Of either kind tenants
take turns: one who has a hundred sequences delays another's token by one of theirs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

_Result = TypeVar("_Result")
_NUM_THREADS = max(1, (os.cpu_count() or 1) // 4)  # of either kind
_SLOW_S = 0.005  # CPU time of one token; most take a twentieth of it


class GrammarWorkers:
    """Quick and slow threads."""

    def __init__(self, token_timeout_s: float) -> None:
        self.token_timeout_s = token_timeout_s
        self._quick = _Turns(ThreadPoolExecutor(_NUM_THREADS, "grammar-token"))
        self._slow = _Turns(ThreadPoolExecutor(_NUM_THREADS, "grammar-slow-token", initializer=yield_to_others))
        self._slow_grammars: weakref.WeakValueDictionary[int, CompiledGrammar] = weakref.WeakValueDictionary()  # by id

    def submit(self, compiled: CompiledGrammar, tenant: str, work: Callable[[], _Result]) -> Future[_Result]:
        """Have work done that follows a grammar of one of a tenant's sequences."""
        return (self._slow if id(compiled) in self._slow_grammars else self._quick).submit(tenant, work)

    def note_cost(self, compiled: CompiledGrammar, seconds: float) -> None:
        """One token of a grammar took so much CPU time. Called from any thread."""
        if seconds > _SLOW_S:
            self._slow_grammars[id(compiled)] = compiled

    def close(self) -> None:
        """End the threads, once what they are at has ended."""
        for turns in (self._quick, self._slow):
            turns.close()


class _Turns:
    """A pool whose work is taken from one tenant after the other."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()  # none is empty

    def submit(self, tenant: str, work: Callable[[], _Result]) -> Future[_Result]:
        """Have it done behind the rest of its tenant's. It is not begun once the future is cancelled."""
        future: Future[_Result] = Future()
        with self._lock:
            self._lines.setdefault(tenant, deque()).append((future, work))
        self._pool.submit(self._do_next)
        return future

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for line in self._lines.values():
                for future, _ in line:
                    future.cancel()

    def _do_next(self) -> None:
        """As many calls are in the pool as there is work in the lines."""
        with self._lock:
            tenant, line = self._lines.popitem(last=False)
            future, work = line.popleft()
            if line:
                self._lines[tenant] = line  # behind the others'
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


def yield_to_others() -> None:
    """This thread runs when engine and experts leave it time."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
