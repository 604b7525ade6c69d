"""Processes under simulated time: they run, stop, go on, die. Each has an event loop, for the product's coroutines.

What a process was going to do happens when it goes on, in its order, and never once it is dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any, cast

from cluster.simulation.world.events import Event, EventQueue


class Process:
    """One process on one node; its clock may be apart from everybody else's."""

    def __init__(self, queue: EventQueue, name: str, node: str, clock_offset_s: float = 0.0) -> None:
        self.queue = queue
        self.name = name
        self.node = node
        self.is_alive = self.runs = True
        self.is_stopped = False
        self.slowness = 1.0  # times as long as usual for whatever it computes
        self.clock_offset_s = clock_offset_s
        self.loop = ProcessLoop(self)
        self.on_death: list[Callable[[], object]] = []
        self._missed: list[Event] = []  # while it was stopped

    def __str__(self) -> str:
        return self.name

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
        if self.runs:
            action(*arguments)
        else:
            self.miss(Event(self.queue.now, self, action, arguments))

    def miss(self, event: Event) -> None:
        if self.is_stopped:
            self._missed.append(event)
        else:
            event.cancel()

    def stop(self) -> None:
        """As SIGSTOP does."""
        self.is_stopped, self.runs = True, False

    def go_on(self) -> None:
        """As SIGCONT does."""
        self.is_stopped, self.runs = False, True
        missed, self._missed = self._missed, []
        for event in missed:
            self.queue.again(event)

    def die(self) -> None:
        """As SIGKILL does. Idempotent."""
        if self.is_alive:
            self.is_alive = self.is_stopped = self.runs = False
            self._missed.clear()
            for tell in self.on_death:
                tell()
            self.loop.end()


class ProcessLoop:
    """An event loop whose time is the process's clock: what asyncio needs of one, without files and threads.

    Most events of a simulation are its callbacks, so a handle of one is the event itself: that can be cancelled.
    """

    get_debug = staticmethod(bool)  # False, as quickly as can be: every future and task asks

    def __init__(self, process: Process) -> None:
        self._process = process
        self._as_loop = cast("asyncio.AbstractEventLoop", self)  # as far as anything here asks
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._last: deque[Event] = deque()  # what is still to be called when the process has died
        self._runs, self._forgets = self._run, self._forget  # bound once
        self.is_over = False

    def time(self) -> float:
        return self._process.clock()

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Event | None:
        if callback is self._forgets:
            self._forget(*args)  # at once, and in no event: it changes nothing that anybody else sees
            return None
        process = self._process
        call = (copy_context() if context is None else context, callback, *args)
        if self.is_over:
            event = Event(process.queue.now, process, self._runs, call)
            self._last.append(event)
            return event
        return process.queue.soon(process, self._runs, call)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> Event | None:
        return self.call_soon(callback, *args, context=context)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> Event:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> Event:
        return self._process.at(when, self._runs, copy_context() if context is None else context, callback, *args)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(
            coro, loop=self._as_loop, name=name or self._process.name, context=context
        )
        self._tasks[task] = None
        task.add_done_callback(self._forgets)
        return task

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

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
                event = self._last.popleft()
                if event.is_waiting:
                    with suppress(Exception):
                        event.arguments[0].run(*event.arguments[1:])
        finally:
            asyncio._set_running_loop(before)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        """It has ended. What does not hold in it ends the simulation."""
        self._tasks.pop(task, None)
        if not task.cancelled() and isinstance(error := task.exception(), AssertionError) and not self.is_over:
            raise error

    def _run(self, context: Context, callback: Any, *args: Any) -> None:
        asyncio._set_running_loop(self._as_loop)
        try:
            context.run(callback, *args)
        finally:
            asyncio._set_running_loop(None)
