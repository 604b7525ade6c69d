"""What keeps an event loop from its callbacks is told by whose time it was."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry

from cluster.telemetry.loop_watch import LoopWatch


def blocks(block: Callable[[], Awaitable[None]]) -> tuple[tuple[float, float, float], CollectorRegistry]:
    """The longest ones, by time of the loop's thread, of the process and of the clock, while `block` runs once."""
    registry = CollectorRegistry()
    watch = LoopWatch(registry, beat_s=0.002)

    async def run() -> None:
        watch.start()
        await asyncio.sleep(0.02)
        await block()
        await asyncio.sleep(0.02)

    asyncio.run(run())
    return watch.longest, registry


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_our_own_code_is_the_loops_time() -> None:
    async def block() -> None:
        spin(0.1)

    (loop, process, wall), registry = blocks(block)
    assert min(loop, process, wall) >= 0.09
    page = {(sample.name, *sample.labels.values()): sample.value for m in registry.collect() for sample in m.samples}
    name = "manta_event_loop_longest_block_seconds"
    assert page[name, "minute", "loop"] == page[name, "start", "loop"] == loop
    assert page["manta_event_loop_block_seconds_bucket", "0.05"] < page[("manta_event_loop_block_seconds_count",)]


def test_a_machine_that_is_busy_with_others_is_nobodys_time() -> None:
    async def block() -> None:
        time.sleep(0.5)

    (loop, process, wall), _ = blocks(block)
    assert wall >= 0.49
    assert max(loop, process) < wall / 2, "other threads of the tests' process do little"


def test_a_thread_that_holds_the_interpreter_is_the_processs_time() -> None:
    """As a parser does for as long as it runs."""
    text = "[" + "[], " * 1_000_000 + "1]"
    took_s = []

    def parse() -> None:
        began = time.thread_time()
        gc.disable()  # whoever asked to be told of its runs lets others have the interpreter
        try:
            json.loads(text)
        finally:
            gc.enable()
        took_s.append(time.thread_time() - began)

    async def block() -> None:
        await asyncio.to_thread(parse)

    (loop, process, wall), _ = blocks(block)
    assert loop < process / 2
    assert took_s[0] / 2 < process <= wall
