"""A token bucket: so much a minute, evenly, with a minute's worth in reserve. Knows time; knows not what it counts.

Libraries' rate limiters are told what a request costs before it passes. Ours takes debts: nobody knows then how long an
answer gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable


class Bucket:
    """Starts full. `take` may leave a debt, which has to fill up first: what is taken is not always known before."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        """What is in it now; below 0 it is a debt."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._filled_at) * self.per_minute / 60)
        self._filled_at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level - amount

    def give_back(self, amount: float) -> None:
        """What was taken for nothing."""
        self._level = min(self.per_minute, self.level + amount)

    def wait_s(self, amount: float) -> float:
        """Until so much is in it. More than it can hold is given once it is full, and leaves a debt."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)

    @property
    def remaining(self) -> int:
        """Whole units that can be taken now."""
        return max(0, math.floor(self.level))

    @property
    def reset_s(self) -> float:
        """Until it is full."""
        return self.wait_s(self.per_minute)
