"""A flag that the handler of a signal may set. Knows no signal and no command."""

from __future__ import annotations

import ctypes
import time
from multiprocessing.sharedctypes import RawValue

LOOK_S = 0.1  # between two looks of who waits


class SignalFlag:
    """Set once, shared with processes that are forked afterwards. Has no lock.

    A handler runs in the midst of whatever the main thread does. Where that thread holds an Event's lock, as it does
    for moments while it waits or is in the handler already, `Event.set` waits for it and never returns.
    """

    def __init__(self) -> None:
        self._value = RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        """May be called from anywhere, any number of times."""
        self._value.value = True

    def is_set(self) -> bool:
        """Whether anybody has set it."""
        return bool(self._value.value)

    def wait(self, timeout_s: float) -> bool:
        """Return at its end, or soon after the flag is set: whether it is."""
        deadline = time.monotonic() + timeout_s
        while not self.is_set() and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_S))
        return self.is_set()
