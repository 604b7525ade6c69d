"""Until when something is wanted. Pickled, it is the seconds that are left, because the clocks of two hosts differ.

    gateway      Deadline at its monotonic 1600 ── pickled at 1040 ──▶ "560 s left"
    coordinator  arrives at its monotonic 77 ──▶ Deadline at 637

The way itself is not counted: the copy ends that much later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of this process."""

    at: float  # seconds, of time.monotonic()

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """From now on."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining_s(self) -> float:
        """Negative once it has passed."""
        return self.at - time.monotonic()

    def __reduce__(self) -> tuple[Callable[[float], Deadline], tuple[float]]:
        return Deadline.after, (self.remaining_s,)


NEVER = Deadline(float("inf"))
