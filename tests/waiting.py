"""Bounded waits."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return once the condition is true; an AssertionError that names it after `timeout_s`."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
