"""How long the event loop of a process keeps its callbacks waiting. Knows time and CPU time; knows no callback.

    beat ──▶ (BEAT_S) ──▶ due ──── late ────▶ next beat

How late a beat comes is how long all else had to wait. On a busy machine that may be anybody's fault, so it is told in
three times, each at most that: `loop` is CPU time of the loop's own thread, so our callbacks ran for so long; `process`
is that of all threads, one of which may have held the interpreter; `wall` is the wait itself. A block is seen short by
up to BEAT_S, as it may begin at any time between two beats.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

BEAT_S = 0.01
WINDOW_S = 30.0
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TIMES = ("loop", "process", "wall")


class LoopWatch(Collector):
    """Watches one loop, from within it."""

    def __init__(self, registry: CollectorRegistry, beat_s: float = BEAT_S) -> None:
        self._beat_s = beat_s
        self._now = self._clocks()
        self._is_started = False
        self._window_ends = 0.0
        self._window = self._last_window = (0.0, 0.0, 0.0)
        self.longest = (0.0, 0.0, 0.0)  # since `start`, in the order of TIMES
        self._blocks = Histogram(
            "manta_event_loop_block_seconds",
            "CPU time for which callbacks of the event loop kept the next one waiting.",
            buckets=BUCKETS_S,
            registry=registry,
        )
        registry.register(self)

    def start(self) -> None:
        """Watch the running loop from now on, for as long as it runs. Idempotent.

        For a replica's `check_health`: Serve calls it first when all is done that keeps nobody waiting, its own
        imports and the collection of garbage after ours as well, and no request comes before it has returned.
        """
        if self._is_started:
            return
        self._is_started = True
        loop = asyncio.get_running_loop()

        def beat() -> None:
            self._observe()
            loop.call_later(self._beat_s, beat)

        self._now = self._clocks()
        loop.call_later(self._beat_s, beat)

    def collect(self) -> Iterable[Metric]:
        longest = GaugeMetricFamily(
            "manta_event_loop_longest_block_seconds",
            "The longest time that the event loop kept callbacks waiting: in the last minute, and since it was ready.",
            labels=["window", "time"],
        )
        recent = map(max, self._window, self._last_window)
        for window, blocks in (("minute", recent), ("start", self.longest)):
            for name, seconds in zip(TIMES, blocks, strict=True):
                longest.add_metric([window, name], seconds)
        yield longest

    def _observe(self) -> None:
        before, self._now = self._now, self._clocks()
        loop, process, wall = (now - then for now, then in zip(self._now, before, strict=True))
        late = max(0.0, wall - self._beat_s)
        block = min(late, loop), min(late, process), late
        self._blocks.observe(block[0])
        if self._now[2] >= self._window_ends:
            self._last_window, self._window = self._window, (0.0, 0.0, 0.0)
            self._window_ends = self._now[2] + WINDOW_S
        self._window = _longer(self._window, block)
        self.longest = _longer(self.longest, block)

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        return time.thread_time(), time.process_time(), time.monotonic()


def _longer(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])
