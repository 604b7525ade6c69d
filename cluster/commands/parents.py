"""What Linux does with a process whose parent ends. For Linux alone; imports no Ray."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent(by: signal.Signals) -> None:
    """This process gets `by` when the thread that started it ends, also after exec.

    A parent may have ended before: that is for the caller to see afterwards.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(by))


def adopt_orphans() -> None:
    """What this process started, or that started, becomes its child where it loses its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
