"""Who may watch the server's health, and how many at a time. Knows callers and counts; no state of health."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Overloaded, Unavailable

MAX_OF_CALLER = 4
MAX_OF_ALL = 64


class Watches:
    """One more than MAX_OF_ALL ends the oldest of the caller that has most: nobody is kept out by those who stay."""

    def __init__(self) -> None:
        self._callers: dict[asyncio.Event, str] = {}  # the oldest first
        self._is_ending = False

    @property
    def why_over(self) -> Overloaded | Unavailable:
        """Of a watch that was ended, or that was refused because none is kept any more."""
        if self._is_ending:
            return Unavailable("this gateway ends; watch again")
        return Overloaded("this watch has to give way; watch again", reason="shed_watches")

    def end(self) -> None:
        """Ends all, as the process is about to: nothing waits for those who only watch."""
        self._is_ending = True
        for over in self._callers:
            over.set()

    @contextmanager
    def place(self, caller: str) -> Iterator[asyncio.Event]:
        """For the time of one watch, which has to end when the event is set. Raises Overloaded and Unavailable."""
        if self._is_ending:
            raise self.why_over
        counts = Counter(self._callers.values())
        if counts[caller] >= MAX_OF_CALLER:
            raise Overloaded(f"at most {MAX_OF_CALLER} watches of one connection", reason="shed_watches")
        if len(self._callers) >= MAX_OF_ALL:
            [(most, _)] = counts.most_common(1)
            oldest = next(over for over, one in self._callers.items() if one == most)
            del self._callers[oldest]
            oldest.set()
        over = asyncio.Event()
        self._callers[over] = caller
        try:
            yield over
        finally:
            self._callers.pop(over, None)
