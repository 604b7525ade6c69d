"""Simulated time: what happens next, in one order, and the numbers that chance gives. Knows nothing of what happens.

    queue = EventQueue(seed=7)
    queue.after(0.25, shard.answer, attempt)      # an action and its arguments; seconds
    timer = queue.at(60.0, gateway.give_up, key)
    timer.cancel()
    delay_s = queue.chance("network/a-b").expovariate(1 / 0.0002)
    queue.run(until=3600.0)

One seed, one run: events of the same moment happen in the order in which they were put in, and each name has numbers of
its own, so that a fault that is left out changes no number of anybody else. An event costs what a heap of all that are
waiting costs; one that was cancelled is dropped when its moment comes.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any


class Event:
    """An action at its moment. It happens once, unless it is cancelled before."""

    __slots__ = ("action", "arguments", "at", "number")

    def __init__(self, at: float, number: int, action: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.at = at  # seconds since the beginning
        self.number = number  # in the order in which they were put in
        self.action: Callable[..., object] | None = action
        self.arguments = arguments

    @property
    def is_waiting(self) -> bool:
        """Whether it is still going to happen."""
        return self.action is not None

    def cancel(self) -> None:
        """It will not happen. Idempotent, also of one that has happened."""
        self.action, self.arguments = None, ()

    def __str__(self) -> str:
        what = "cancelled" if self.action is None else getattr(self.action, "__qualname__", repr(self.action))
        return f"{self.at:12.6f}  {what}({', '.join(map(str, self.arguments))})"


class EventQueue:
    """The only clock of a simulation, and what waits for it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0  # seconds since the beginning
        self.num_events = 0  # that have happened
        self.watch: Callable[[Event], object] | None = None  # is shown each event before it happens
        self._waiting: list[tuple[float, int, Event]] = []
        self._number = 0
        self._chances: dict[str, Random] = {}

    def clock(self) -> float:
        """What `time.monotonic` is to the product."""
        return self.now

    def chance(self, name: str) -> Random:
        """The source of random numbers of that name: the same object at each call, and independent of all others."""
        source = self._chances.get(name)
        if source is None:
            source = self._chances[name] = Random(f"{self.seed}/{name}")
        return source

    def at(self, moment: float, action: Callable[..., object], *arguments: Any) -> Event:
        """Have `action(*arguments)` happen at a moment; one that has passed is now."""
        self._number += 1
        event = Event(max(moment, self.now), self._number, action, arguments)
        heappush(self._waiting, (event.at, event.number, event))
        return event

    def after(self, seconds: float, action: Callable[..., object], *arguments: Any) -> Event:
        """The same so many seconds from now."""
        return self.at(self.now + seconds, action, *arguments)

    def step(self, until: float = float("inf")) -> bool:
        """Let the next event happen, if there is one before `until` or at it."""
        waiting = self._waiting
        while waiting and waiting[0][0] <= until:
            _, _, event = heappop(waiting)
            action, arguments = event.action, event.arguments
            if action is not None:
                self.now = event.at
                self.num_events += 1
                if self.watch is not None:
                    self.watch(event)
                event.cancel()
                action(*arguments)
                return True
        return False

    def run(self, until: float, after_each: Callable[[], object] | None = None) -> None:
        """Let all events up to `until` happen; it is `until` then. `after_each` looks at what each of them left."""
        while self.step(until):
            if after_each is not None:
                after_each()
        self.now = max(self.now, until)
