"""Processes under simulated time: they run, stop, go on, die. Each has an event loop, for the product's coroutines.

What a process was going to do happens when it goes on, in its order, and never once it is dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, cast

from cluster.simulation.world.events import Event, EventQueue


class Process:
    """One process on one node; its clock may be apart from everybody else's."""

    def __init__(self, queue: EventQueue, name: str, node: str, clock_offset_s: float = 0.0) -> None:
        self.queue = queue
        self.name = name
        self.node = node
        self.is_alive = True
        self.is_stopped = False
        self.slowness = 1.0  # times as long as usual for whatever it computes
        self.clock_offset_s = clock_offset_s
        self.loop = ProcessLoop(self)
        self.on_death: list[Callable[[], object]] = []
        self._put_off: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __str__(self) -> str:
        return self.name

    @property
    def runs(self) -> bool:
        return self.is_alive and not self.is_stopped

    def clock(self) -> float:
        """Its own monotonic clock."""
        return self.queue.now + self.clock_offset_s

    def at(self, moment: float, action: Callable[..., object], *arguments: Any) -> Event:
        """Have something happen in it at a moment of its own clock."""
        return self.queue.put(moment - self.clock_offset_s, self, action, arguments)

    def after(self, seconds: float, action: Callable[..., object], *arguments: Any) -> Event:
        """The same so many seconds from now."""
        return self.queue.put(self.queue.now + seconds, self, action, arguments)

    def do(self, action: Callable[..., object], *arguments: Any) -> None:
        """Now, or when it goes on."""
        if self.is_stopped:
            self.put_off(action, arguments)
        elif self.is_alive:
            action(*arguments)

    def put_off(self, action: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._put_off.append((action, arguments))

    def stop(self) -> None:
        """As SIGSTOP does."""
        self.is_stopped = True

    def go_on(self) -> None:
        """As SIGCONT does."""
        self.is_stopped = False
        put_off, self._put_off = self._put_off, []
        for action, arguments in put_off:
            self.queue.put(self.queue.now, self, action, arguments)

    def die(self) -> None:
        """As SIGKILL does. Idempotent."""
        if self.is_alive:
            self.is_alive = self.is_stopped = False
            self._put_off.clear()
            for tell in self.on_death:
                tell()
            self.loop.end()


class ProcessLoop:
    """An event loop whose time is the process's clock: what asyncio needs of one, without files and threads."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._as_loop = cast("asyncio.AbstractEventLoop", self)  # as far as anything here asks
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._last: deque[asyncio.Handle] = deque()  # what is still to be called when the process has died
        self.is_over = False

    def time(self) -> float:
        return self._process.clock()

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = _Handle(callback, args, context or copy_context())
        process = self._process
        if self.is_over:
            self._last.append(handle)
        else:
            process.queue.put(process.queue.now, process, self._run, (handle,))
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        handle = _Timer(when, callback, args, self._as_loop, context)
        handle.event = self._process.at(when, self._run, handle)
        return handle

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self._as_loop, name=name, context=context)
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.is_over

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody caught ends the simulation: in a callback, or in a task that nobody waits for."""
        if not self.is_over:
            raise AssertionError(f"{self._process}: {context['message']}") from context.get("exception")

    def end(self) -> None:
        """Its process has died: its tasks are cancelled, and let go of what they hold, in no event of theirs."""
        if self.is_over:
            return
        self.is_over = True
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self._as_loop)
        try:
            for task in list(self._tasks):
                task.cancel()
            while self._last:
                handle = self._last.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(before)

    def _timer_handle_cancelled(self, handle: _Timer) -> None:
        if handle.event is not None:
            handle.event.cancel()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, AssertionError):
            raise error

    def _run(self, handle: Any) -> None:
        if handle._cancelled:
            return
        asyncio._set_running_loop(self._as_loop)
        try:
            handle._context.run(handle._callback, *handle._args)
        finally:
            asyncio._set_running_loop(None)


class _Handle(asyncio.Handle):
    """Without what only a loop in debug mode needs: there is one for every step of a task."""

    def __init__(self, callback: Any, arguments: tuple[Any, ...], context: Context) -> None:
        self._callback, self._args, self._context = callback, arguments, context
        self._cancelled = False
        self._repr = None

    def cancel(self) -> None:
        self._cancelled = True


class _Timer(asyncio.TimerHandle):
    """Takes its event with it when it is cancelled."""

    event: Event | None = None
