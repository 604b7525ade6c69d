"""The event queue: one order, one clock, and numbers that depend on the seed and their name alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from math import inf

import pytest

from cluster.simulation.world.events import EventQueue
from cluster.simulation.world.processes import Process


def test_events_happen_at_their_moments_and_those_of_one_moment_in_the_order_they_were_put_in() -> None:
    queue, seen = EventQueue(0), []
    queue.at(2.0, lambda: seen.append((queue.now, "late")))
    queue.at(1.0, lambda: seen.append((queue.now, "first")))
    queue.at(1.0, lambda: queue.after(0.0, lambda: seen.append((queue.now, "put in by the second"))))
    queue.at(1.0, lambda: seen.append((queue.now, "third")))
    queue.run(until=2.0)
    assert seen == [(1.0, "first"), (1.0, "third"), (1.0, "put in by the second"), (2.0, "late")]


def test_what_is_after_the_end_waits_and_time_goes_on_to_the_end() -> None:
    queue, seen = EventQueue(0), []
    queue.at(1.5, seen.append, "x")
    queue.run(until=1.0)
    assert (queue.now, seen) == (1.0, [])
    queue.at(0.5, lambda: seen.append(queue.now))  # a moment that has passed is now
    queue.run(until=2.0)
    assert seen == [1.0, "x"]


def test_a_cancelled_event_neither_happens_nor_counts() -> None:
    queue, seen, looks = EventQueue(0), [], []
    event = queue.after(1.0, seen.append, "cancelled")
    queue.after(1.0, event.cancel)
    other = queue.after(0.5, event.cancel)
    queue.run(until=3.0, after_each=lambda: looks.append(queue.now))
    assert (seen, looks, queue.num_events) == ([], [0.5, 1.0], 2)
    assert not event.is_waiting
    assert not other.is_waiting


def test_events_are_looked_at_from_a_moment_on() -> None:
    queue, looks = EventQueue(0), []
    for moment in 1.0, 2.0, 3.0:
        queue.at(moment, str)
    queue.at(3.5, setattr, queue, "look_from", -inf)
    queue.look_from = 2.0
    queue.run(after_each=lambda: (looks.append(queue.now), setattr(queue, "look_from", 3.2)))
    assert looks == [2.0, 3.5]


def test_what_a_stopped_process_misses_happens_when_it_goes_on_in_its_order_unless_it_is_cancelled() -> None:
    """A timer that was cancelled after its moment had come was not: the process had it put off by then."""
    queue, seen = EventQueue(0), []
    process = Process(queue, "a", "node0")
    process.after(1.0, seen.append, "first")
    timers = process.after(2.0, seen.append, "cancelled"), process.loop.call_later(2.0, seen.append, "cancelled")
    process.after(3.0, seen.append, "third")
    process.stop()
    process.do(seen.append, "at once")
    queue.run(until=4.0)
    for timer in timers:
        timer.cancel()
    process.go_on()
    queue.run(until=5.0)
    assert seen == ["at once", "first", "third"]
    process.stop()
    process.do(seen.append, "never")
    process.die()
    process.do(seen.append, "never")
    queue.run()
    assert len(seen) == 3


def test_what_does_not_hold_in_a_task_ends_the_simulation_at_that_moment() -> None:
    async def fails() -> None:
        await asyncio.sleep(1.0)
        raise AssertionError("this does not hold")

    queue = EventQueue(0)
    process = Process(queue, "a", "node0")
    process.loop.call_soon(lambda: process.loop.create_task(fails()))
    queue.at(2.0, str)
    with pytest.raises(AssertionError, match="does not hold"):
        queue.run()
    assert queue.now == 1.0
    process.loop.end()


def test_chance_depends_on_the_seed_and_the_name_and_on_no_other_draw() -> None:
    one, other = EventQueue(7), EventQueue(7)
    other.chance("somebody else").random()
    drawn = [one.chance("a").random() for _ in range(3)]
    assert drawn == [other.chance("a").random() for _ in range(3)]
    assert drawn != [EventQueue(8).chance("a").random() for _ in range(3)]
    assert one.chance("a").random() != one.chance("b").random()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_chance_is_the_same_in_every_process(hash_seed: str) -> None:
    program = "from cluster.simulation.world.events import EventQueue; print(EventQueue(7).chance('a').random())"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
    )
    assert float(told.stdout) == EventQueue(7).chance("a").random()
