"""Simulated time: what happens next, in one order, and the numbers that chance gives. Knows nothing of what happens.

    queue = EventQueue(seed=7)
    queue.after(0.25, fleet.look, group)      # an action and its arguments; seconds
    timer = queue.at(60.0, gateway.give_up, key)
    timer.cancel()
    delay_s = queue.chance("network/a-b").expovariate(1 / 0.0002)
    queue.run(until=3600.0)

One seed, one run: events of the same moment happen in the order in which they were put in, and each name has numbers of
its own, so that a fault that is left out changes no number of anybody else. An event costs what a heap of all that are
waiting costs, and one of the present moment not even that. What was cancelled is let go of before it is half of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf
from random import Random
from typing import Any, Protocol

FEWEST_TO_CLEAR = 1024  # waiting events, of which those that were cancelled are looked for


class Owner(Protocol):
    """A process, whose events happen while it runs."""

    runs: bool

    def miss(self, event: Event) -> None:
        """It is stopped, so this happens when it goes on; or dead, and it never does."""


class Event:
    """An action at its moment. It happens once, unless it is cancelled before."""

    __slots__ = ("action", "arguments", "at", "owner")

    def __init__(
        self, at: float, owner: Owner | None, action: Callable[..., object], arguments: tuple[Any, ...]
    ) -> None:
        self.at = at  # seconds since the beginning
        self.owner = owner
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
        self.look_from = -inf  # the moment from which `after_each` looks at what events left
        self._waiting: list[tuple[float, int, Event]] = []
        self._soon: deque[Event] = deque()  # of the present moment: behind those of it that have waited for it
        self._number = 0
        self._clear_at = FEWEST_TO_CLEAR
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
        return self.put(moment, None, action, arguments)

    def after(self, seconds: float, action: Callable[..., object], *arguments: Any) -> Event:
        """The same so many seconds from now."""
        return self.put(self.now + seconds, None, action, arguments)

    def put(
        self, moment: float, owner: Owner | None, action: Callable[..., object], arguments: tuple[Any, ...]
    ) -> Event:
        """The same, in a process: never once it is dead, and when it goes on if it is stopped then."""
        if moment <= self.now:
            return self.soon(owner, action, arguments)
        event = Event(moment, owner, action, arguments)
        self._number += 1
        waiting = self._waiting
        heappush(waiting, (moment, self._number, event))
        if len(waiting) >= self._clear_at:
            waiting[:] = [one for one in waiting if one[2].action is not None]
            heapify(waiting)
            self._clear_at = max(FEWEST_TO_CLEAR, 2 * len(waiting))
        return event

    def soon(self, owner: Owner | None, action: Callable[..., object], arguments: tuple[Any, ...]) -> Event:
        """The same at the present moment."""
        event = Event(self.now, owner, action, arguments)
        self._soon.append(event)
        return event

    def again(self, event: Event) -> None:
        """One that its owner has missed happens now."""
        event.at = self.now
        self._soon.append(event)

    def run(self, until: float = inf, after_each: Callable[[], object] | None = None) -> None:
        """Let all events up to `until` happen; it is `until` then, if that is said.

        `after_each` looks at what each of them left, from the moment `look_from` on.
        """
        waiting, soon, watch = self._waiting, self._soon, self.watch
        while True:
            if soon:
                event = heappop(waiting)[2] if waiting and waiting[0][0] <= self.now else soon.popleft()
            elif waiting and waiting[0][0] <= until:
                event = heappop(waiting)[2]
            else:
                break
            action, arguments, owner = event.action, event.arguments, event.owner
            if action is None:
                continue
            now = self.now = event.at
            self.num_events += 1
            if watch is not None:
                watch(event)
            if owner is None or owner.runs:
                event.action, event.arguments = None, ()
                action(*arguments)
            else:
                owner.miss(event)
            if now >= self.look_from and after_each is not None:
                after_each()
        if until < inf:
            self.now = max(self.now, until)
