"""Calls what may hang, all at once, for as long as one waits. Knows no call; Ray's waits can often not be interrupted.

answers = at_once({"a": ask_a, "b": ask_b}, timeout_s)    # of those that are back in time
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import TypeVar

SPARE_S = 0.5  # beside the timeout that calls have of their own, for them to say so

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def at_once(calls: Mapping[K, Callable[[], T]], timeout_s: float) -> dict[K, T | Exception]:
    """By key, what each returned or raised. The others go on in threads that do not keep the process from ending."""
    outcomes: queue.SimpleQueue[tuple[K, T | Exception]] = queue.SimpleQueue()

    def work(key: K, call: Callable[[], T]) -> None:
        try:
            outcomes.put((key, call()))
        except Exception as error:
            outcomes.put((key, error))

    for key, call in calls.items():
        threading.Thread(target=work, args=(key, call), daemon=True).start()
    answers: dict[K, T | Exception] = {}
    ends_at = time.monotonic() + timeout_s
    with suppress(queue.Empty):
        while len(answers) < len(calls):
            key, answer = outcomes.get(timeout=max(0.0, ends_at - time.monotonic()))
            answers[key] = answer
    return {key: answers[key] for key in calls if key in answers}
