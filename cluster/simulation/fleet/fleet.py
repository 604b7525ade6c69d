"""One way to serve a trace, from the first arrival until the last answer: coordinators, experts, policies, GPUs.

Once a second replicas report, policies decide, and what a coordinator knows of the others is brought up to date.
Between that and its own events a coordinator's step takes the same time.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from cluster.config import CoordinatorScalingConfig, EngineConfig, ScalingConfig
from cluster.planning.scaling_policy import REPORT_INTERVAL_S
from cluster.planning.tier_loads import TierLoads
from cluster.simulation.fleet.coordinator import Coordinator, Sequence
from cluster.simulation.fleet.deployment import Deployment
from cluster.simulation.fleet.outcome import Outcome, Sample
from cluster.simulation.fleet.popularity import Chances, Popularity
from cluster.simulation.fleet.step_costs import Experts, SplitCosts, Stations, WholeCosts, Work, rounded
from cluster.simulation.fleet.trace import Arrival
from cluster.simulation.world.events import Event, EventQueue

SAMPLE_S = 60.0  # of replicas over time
MOST_CACHED = 50_000  # step times that are remembered


@dataclass(frozen=True)
class ShardDeployment:
    """One group on one tier."""

    name: str
    group: int  # of SplitCosts.groups
    scaling: ScalingConfig
    start_s: float
    share: float  # of a GPU; 0: on a machine's CPUs
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """What one variant is made of."""

    name: str
    engine: EngineConfig
    costs: WholeCosts | SplitCosts
    popularity: Popularity
    kv_tokens: int  # of a coordinator
    max_model_len: int
    coordinator_scaling: CoordinatorScalingConfig
    coordinator_start_s: float
    gpus_per_coordinator: int
    shards: tuple[ShardDeployment, ...] = ()
    together: bool = False  # all shards are scaled by the busiest
    request_timeout_s: float = 600.0


@dataclass
class _Run:
    fleet: Fleet
    arrivals: Sequences[Arrival]
    queue: EventQueue
    outcome: Outcome
    coordinators: list[Coordinator] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        fleet = self.fleet
        loads = TierLoads()
        self._of_coordinators = Deployment("coordinator", fleet.coordinator_scaling, fleet.coordinator_start_s)
        self._of_shards = [
            Deployment(one.name, one.scaling, one.start_s, one.tiers, loads)
            for one in (fleet.shards[:1] if fleet.together else fleet.shards)
        ]
        self._next_name = 0
        self._others_rows = 0.0  # of each other coordinator's step, on average
        self._others = 0  # coordinators that run something, beside any one
        self._epoch = -1
        self._chances: Chances
        self._stations: Stations | None = None
        self._step_cache: dict[Work, float] = {}
        self._experts_cache: dict[tuple[float, int, float], Experts] = {}
        self._pending: dict[int, Event] = {}
        self._next_arrival = 0
        self._finished = 0
        self._sampled_s = -SAMPLE_S
        self._look_at_popularity()
        for _ in range(self._of_coordinators.running):
            self._start_coordinator()
        self._place()

    # What happens.

    def arrive(self) -> None:
        """The next request."""
        arrival = self.arrivals[self._next_arrival]
        sequence = Sequence(arrival, self._next_arrival)
        self._next_arrival += 1
        if self._next_arrival < len(self.arrivals):
            self.queue.at(self.arrivals[self._next_arrival].at_s, self.arrive)
        self.sequences.append(sequence)
        open_ones = [one for one in self.coordinators if not one.draining]
        coordinator = min(open_ones, key=lambda one: (one.present, one.name), default=None)
        too_long = arrival.prompt_tokens + arrival.output_tokens > self.fleet.max_model_len
        if coordinator is None or too_long or len(coordinator.waiting) >= self.fleet.engine.max_waiting:
            sequence.state = "shed"
            self._finished += 1
            return
        coordinator.settle(self.queue.now)
        coordinator.take(sequence)
        self._go_on(coordinator)

    def happen(self, coordinator: Coordinator) -> None:
        """A prompt is computed, or an answer ends."""
        coordinator.settle(self.queue.now)
        self._go_on(coordinator)

    def second(self) -> None:
        """Reports and decisions."""
        now = self.queue.now
        for coordinator in self.coordinators:
            coordinator.settle(now)
        self._look_at_others()
        self._look_at_popularity()
        changed = False
        for deployment in (self._of_coordinators, *self._of_shards):
            before = deployment.running
            arrived = deployment.arrive(now)
            if arrived and deployment is self._of_coordinators:
                for _ in range(deployment.running - before):
                    self._start_coordinator()
            changed = changed or (arrived and deployment is not self._of_coordinators)
        changed = self._decide(now) or changed
        if changed:
            self._place()
        for coordinator in list(self.coordinators):
            self._go_on(coordinator)
        self._leave()
        self._account(now)
        if self._finished < len(self.arrivals):
            self.queue.after(REPORT_INTERVAL_S, self.second)

    # How it goes on.

    def _go_on(self, coordinator: Coordinator) -> None:
        ended = coordinator.advance(self.fleet.request_timeout_s)
        self._finished += len(ended)
        work = coordinator.work()
        coordinator.plan(self._step_s(work), work.chunk)
        event = self._pending.pop(coordinator.name, None)
        if event is not None:
            event.cancel()
        seconds = coordinator.next_s()
        if seconds is not None:
            self._pending[coordinator.name] = self.queue.after(seconds, self.happen, coordinator)

    def _step_s(self, work: Work) -> float:
        """Of numbers that are rounded, so that few are computed."""
        work = _rounded(work)
        found = self._step_cache.get(work)
        if found is None:
            found = self._step_cache[work] = self._computed(work)
        return found

    def _computed(self, work: Work) -> float:
        if not work.rows:
            return 0.0
        costs = self.fleet.costs
        if isinstance(costs, WholeCosts):
            return costs.step_s(work, self._chances)
        rows = (work.rows + self._others * self._others_rows) / (self._others + 1)
        return costs.step_s(work, self._experts(rows, self._others + 1, costs.own_s(work)).step_s)

    def _experts(self, rows: float, coordinators: int, own_s: float) -> Experts:
        costs = self.fleet.costs
        assert isinstance(costs, SplitCosts)
        assert self._stations is not None
        rows, own_s = rounded(rows), 0.0 if costs.meet else rounded(own_s * 1e4) / 1e4
        key = (rows, coordinators, own_s)
        found = self._experts_cache.get(key)
        if found is None:
            found = costs.experts(rows, coordinators, self._stations, self._chances, self._epoch, own_s)
            self._experts_cache[key] = found
        return found

    def _look_at_popularity(self) -> None:
        epoch = self.fleet.popularity.epoch(self.queue.now)
        if epoch != self._epoch:
            self._epoch = epoch
            self._chances = self.fleet.popularity.chances(epoch)
            if isinstance(self.fleet.costs, SplitCosts):
                self.fleet.costs.forget()
            self._forget()

    def _forget(self) -> None:
        self._step_cache.clear()
        self._experts_cache.clear()

    def _look_at_others(self) -> None:
        at_work = [one for one in self.coordinators if one.running]
        others = max(0, len(at_work) - 1)
        rows = rounded(sum(one.work().rows for one in at_work) / len(at_work)) if at_work else 0.0
        if (others, rows) != (self._others, self._others_rows):
            self._others, self._others_rows = others, rows
            if others or len(self._step_cache) > MOST_CACHED:
                self._step_cache.clear()

    def _start_coordinator(self) -> None:
        made = Coordinator(self.fleet.engine, self.fleet.kv_tokens, self._next_name, now=self.queue.now)
        self._next_name += 1
        self.coordinators.append(made)

    def _leave(self) -> None:
        """Coordinators that drain, and have nothing left."""
        for one in [one for one in self.coordinators if one.draining and not one.present]:
            self.coordinators.remove(one)
            event = self._pending.pop(one.name, None)
            if event is not None:
                event.cancel()

    def _decide(self, now: float) -> bool:
        """Whether shards are others than before."""
        running = [one for one in self.coordinators if not one.draining]
        if running:
            self._of_coordinators.report(
                sum(one.used_fraction for one in running) / len(running),
                sum(len(one.waiting) for one in running) / len(running),
            )
        for one in running[len(running) - self._of_coordinators.decide(now) :]:
            one.draining = True
        if not self._of_shards:
            return False
        busy, queue_s = self._loads()
        before = [one.running for one in self._of_shards]
        if self.fleet.together:
            self._of_shards[0].report(max(busy), max(queue_s))
        else:
            for deployment, of_shard, waits in zip(self._of_shards, busy, queue_s, strict=True):
                deployment.report(of_shard, waits)
        for deployment in self._of_shards:
            deployment.decide(now)
        return before != [one.running for one in self._of_shards]

    def _loads(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of each shard deployment: the part of the time that a replica computes, and how long dispatches wait."""
        fleet = self.fleet
        at_work = [one for one in self.coordinators if one.running and one.step_s]
        if not at_work:
            return (0.0,) * len(fleet.shards), (0.0,) * len(fleet.shards)
        costs = fleet.costs
        assert isinstance(costs, SplitCosts)
        rows = sum(one.work().rows for one in at_work) / len(at_work)
        own_s = sum(costs.own_s(_rounded(one.work())) for one in at_work) / len(at_work)
        experts = self._experts(rows, len(at_work), own_s)
        step_s = sum(one.step_s for one in at_work) / len(at_work)
        busy = tuple(
            min(1.0, experts.busy_s[one.group] / step_s) if self._takes_rows(index) else 0.0
            for index, one in enumerate(fleet.shards)
        )
        return busy, tuple(experts.queue_s[one.group] for one in fleet.shards)

    # Where shards are.

    def _running(self, index: int) -> int:
        return self._of_shards[0 if self.fleet.together else index].running

    def _number(self, index: int) -> int:
        return self._of_shards[0 if self.fleet.together else index].number

    def _takes_rows(self, index: int) -> bool:
        """Whether a tier of a group is the fastest that has replicas: it gets the rows."""
        one = self.fleet.shards[index]
        others = [
            other
            for number, other in enumerate(self.fleet.shards)
            if other.tiers and other.tiers == one.tiers and number != index and self._running(number)
        ]
        return bool(self._running(index)) and not (one.share == 0 and any(other.share for other in others))

    def _place(self) -> None:
        if not isinstance(self.fleet.costs, SplitCosts):
            return
        shards = range(len(self.fleet.shards))
        used = [self._running(index) if self._takes_rows(index) else 0 for index in shards]
        self._stations = placed(self.fleet.shards, used)
        self._forget()

    def _gpus(self) -> tuple[float, float]:
        """Held by coordinators and by shards, those that start and those that drain among them."""
        coordinators = len(self.coordinators) + len(self._of_coordinators.starting)
        whole = sum(int(one.share) * self._number(index) for index, one in enumerate(self.fleet.shards))
        parts = [
            share
            for index, one in enumerate(self.fleet.shards)
            if (share := one.share % 1)
            for _ in range(self._number(index))
        ]
        free: list[float] = []
        for share in sorted(parts, reverse=True):  # first fit, largest first
            card = next((number for number, left in enumerate(free) if left + 1e-9 >= share), None)
            if card is None:
                free.append(1.0 - share)
            else:
                free[card] -= share
        return coordinators * self.fleet.gpus_per_coordinator, whole + len(free)

    def _account(self, now: float) -> None:
        of_coordinators, of_shards = self._gpus()
        machines = max((self._number(index) for index, one in enumerate(self.fleet.shards) if not one.share), default=0)
        self.outcome.hold(of_coordinators, of_shards, machines, REPORT_INTERVAL_S)
        if now - self._sampled_s >= SAMPLE_S:
            self._sampled_s = now
            self.outcome.samples.append(
                Sample(
                    now,
                    len(self.coordinators),
                    tuple(self._running(index) for index in range(len(self.fleet.shards))),
                    of_coordinators + of_shards,
                    sum(one.running for one in self.coordinators),
                    sum(len(one.waiting) for one in self.coordinators),
                )
            )


def placed(shards: Sequences[ShardDeployment], running: Sequences[int]) -> Stations:
    """Stations of running replicas: GPUs are filled up one after the other, those of a group apart.

    First replicas come first, so that they stay where they are when there are more.
    """
    free: list[float] = []
    members: list[set[int]] = []
    of_group: list[list[int]] = [[] for _ in range(1 + max((one.group for one in shards), default=-1))]
    on_cpus: list[tuple[int, int]] = []  # group, machine
    for turn in range(max(running, default=0)):
        for one, number in zip(shards, running, strict=True):
            if turn >= number:
                continue
            if not one.share:
                on_cpus.append((one.group, turn))
                continue
            fit = (card for card, left in enumerate(free) if left + 1e-9 >= one.share)
            card = next((card for card in fit if one.group not in members[card]), None)
            if card is None:
                card = len(free)
                free.append(max(1.0, one.share))
                members.append(set())
            free[card] -= one.share
            members[card].add(one.group)
            of_group[one.group].append(card)
    for group, machine in on_cpus:
        of_group[group].append(len(free) + machine)
    return Stations(tuple(map(tuple, of_group)))


def _rounded(work: Work) -> Work:
    return Work(
        work.decodes,
        rounded(work.context) if work.decodes else 0.0,
        rounded(work.chunk) if work.chunk else 0.0,
        rounded(work.chunk_start) if work.chunk else 0.0,
    )


def serve(fleet: Fleet, arrivals: Sequences[Arrival], seed: int = 0) -> Outcome:
    """Until the last answer."""
    outcome = Outcome(fleet.name, tuple(one.name for one in fleet.shards))
    run = _Run(fleet, arrivals, EventQueue(seed), outcome)
    if arrivals:
        run.queue.at(arrivals[0].at_s, run.arrive)
        run.queue.at(0.0, run.second)
    run.queue.run()
    outcome.end(run.sequences)
    return outcome
