"""Whom a coordinator has just refused: for a moment they are refused here. Knows names and times; knows no request.

A refusal of the coordinator costs it a call, whose time its steps lack, and the gateway a prompt that is tokenized for
nothing. The moment is too short for a full queue to run empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import Overloaded

HOLD_S = 0.1


class RecentRefusals:
    """By model and caller: where one is refused, another may still have a place, and so may a more urgent request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused: dict[tuple[str, str], tuple[float, Overloaded, int]] = {}  # when, with what, which priority

    def note(self, model: str, caller: str, error: Overloaded, priority: int = 0) -> None:
        """The model's coordinator has refused this caller."""
        now = self._clock()
        self._refused = {who: at for who, at in self._refused.items() if now - at[0] < HOLD_S}
        # Not the error itself: its traceback holds the refused request.
        self._refused[model, caller] = (now, _same(error), priority)

    def check(self, model: str, caller: str, priority: int = 0) -> None:
        """Raises Overloaded, as the coordinator did."""
        at, error, refused = self._refused.get((model, caller), (float("-inf"), None, 0))
        if error is not None and priority >= refused and self._clock() - at < HOLD_S:
            raise _same(error)


def _same(error: Overloaded) -> Overloaded:
    copy = Overloaded(str(error), retry_after_s=error.retry_after_s)
    copy.reason = error.reason
    return copy
