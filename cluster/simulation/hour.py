"""python -m cluster.simulation.hour: a thousand shards, 64 coordinators and 10,000 requests a minute, for an hour.

One token here stands for many, and one dispatch of a step for all of its layers: what is measured is what the decisions
of so large a fleet cost, and whether they hold together while processes die all the time.
"""

from __future__ import annotations

import gc
import logging
import sys
import time

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.simulation.coordinator import EngineCosts
from cluster.simulation.faults import Kind, draw
from cluster.simulation.gateway import Arrival
from cluster.simulation.members import FleetSpec
from cluster.simulation.scenario import Run, Scenario
from cluster.simulation.shards import ShardCosts
from cluster.simulation.world.events import EventQueue

TELL_S = 600.0


def large(
    minutes: float,
    *,
    groups: int = 8,
    copies: int = 125,
    coordinators: int = 64,
    requests_a_minute: int = 10_000,
    faults_a_minute: float = 4.0,
) -> Scenario:
    """Requests of 1 to 4 tokens, each of which stands for 64: a step of a coordinator takes a second or two."""
    seed, until = 1, 60.0 * minutes
    chance = EventQueue(seed).chance("scenario")
    spec = FleetSpec(
        groups=groups,
        nodes=150,
        slots=9,
        gateways=4,
        experts=ScalingConfig(min_replicas=copies, max_replicas=copies),
        coordinators=CoordinatorScalingConfig(min_replicas=coordinators, max_replicas=coordinators),
        engine=EngineCosts(
            layer_s=2.0,
            token_s=0.002,
            num_kv_blocks=4096,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_waiting=1024,
        ),
        shard=ShardCosts(batch_s=0.05, row_s=0.0002, load_s=60.0),
        promises_deadlines=False,
        checks_blocks=False,
    )
    number = round(requests_a_minute * minutes)
    arrivals = tuple(
        Arrival(
            at=until * index / number,
            name=f"r{index}",
            prompt_tokens=chance.choice([2, 4, 16]),
            output_tokens=chance.choice([1, 2, 4]),
            prefix=chance.randrange(1000),
            timeout_s=300.0,
        )
        for index in range(number)
    )
    kinds: tuple[Kind, ...] = ("kill shard", "kill supervisor", "stop shard", "slow shard", "kill coordinator")
    faults = draw(chance, round(faults_a_minute * minutes), until, kinds)
    return Scenario(seed, spec, arrivals, tuple(faults), gently=True, until=until)


class Progress:
    """Tells every ten simulated minutes what they took, and has garbage collected then alone.

    Nearly nothing here is garbage in cycles, and to look through a million objects for it took a quarter of the time.
    """

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self.began = self._last_s = time.process_time()
        self._last_events = 0

    def __enter__(self) -> Progress:
        gc.disable()
        self._queue.after(TELL_S, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        gc.enable()

    def _tell(self) -> None:
        gc.collect()
        gc.freeze()
        queue, now = self._queue, time.process_time()
        seconds, events = now - self._last_s, queue.num_events - self._last_events
        print(f"{queue.now / 60:5.0f} min: {events} events, {seconds:.1f} s, {1e6 * seconds / events:.1f} µs each")
        self._last_s, self._last_events = now, queue.num_events
        queue.after(TELL_S, self._tell)


def main(arguments: list[str]) -> int:
    """Minutes, 60 where none are said. Returns 1 where something does not hold."""
    logging.getLogger("gateway").setLevel(logging.ERROR)  # that attempts fail is what they are for
    minutes = float(arguments[0]) if arguments else 60.0
    run = Run(large(minutes), watched=False)
    with Progress(run.queue) as progress:
        outcome = run.outcome()
    seconds = time.process_time() - progress.began
    print(
        f"{minutes:g} min, {outcome.num_requests} requests, {outcome.num_failed} failed, {outcome.num_faults} faults, "
        f"{outcome.num_attempts} attempts, {outcome.num_events} events: {seconds:.1f} s of CPU, "
        f"{1e6 * seconds / outcome.num_events:.1f} µs an event, {outcome.violation or 'all holds'}"
    )
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
