"""One seed, one run: a fleet, its requests and its faults, all drawn from a number, and what came of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from zlib import crc32

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.simulation.coordinator import EngineCosts
from cluster.simulation.faults import LATER_KINDS, Fault, Faults, draw
from cluster.simulation.gateway import Arrival
from cluster.simulation.invariants import Invariants, Violation
from cluster.simulation.members import Fleet, FleetSpec
from cluster.simulation.serve import Serve
from cluster.simulation.shards import ShardCosts
from cluster.simulation.world.events import Event, EventQueue

LAST_EVENTS = 40
SETTLE_S = 60.0  # after the last request, so that everybody is well again
MOST_EVENTS_AT_ONCE = 20_000  # without time going on: then something spins


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that is given to a run."""

    seed: int
    spec: FleetSpec
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...]
    gently: bool
    until: float


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    violation: str | None
    at: float
    num_events: int
    digest: int  # of all events
    num_requests: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_attempts: int = 0
    num_answers: int = 0
    num_hedges: int = 0
    num_faults: int = 0
    happened: list[str] = field(default_factory=list)  # faults, as they hit
    last_events: list[str] = field(default_factory=list)


def scenario(seed: int) -> Scenario:
    """What a seed stands for."""
    chance = EventQueue(seed).chance("scenario")
    kind = chance.choices(["gentle", "harsh", "scaling"], [6, 2, 2])[0]
    scales = kind == "scaling"
    groups, copies = chance.choice([(2, 2), (2, 3), (3, 2), (4, 2)])
    coordinators = chance.choice([2, 2, 3])
    until = 150.0 if scales else 45.0
    spec = FleetSpec(
        groups=2 if scales else groups,
        nodes=chance.choice([3, 4, 6]),
        slots=6,
        gateways=chance.choice([1, 2]),
        experts=ScalingConfig(
            min_replicas=1 if scales else copies,
            max_replicas=5 if scales else copies,
            upscale_delay_s=5.0,
            downscale_delay_s=15.0,
            target_busy_fraction=0.5,
            max_queue_s=0.1,
        ),
        coordinators=CoordinatorScalingConfig(
            min_replicas=coordinators,
            max_replicas=coordinators + scales,
            upscale_delay_s=5.0,
            downscale_delay_s=15.0,
        ),
        engine=EngineCosts(
            layer_s=0.15 if scales else chance.choice([0.04, 0.08, 0.16]),
            num_layers=chance.choice([1, 1, 2]),
            microbatches=chance.choice([1, 1, 2]),
            num_kv_blocks=chance.choice([48, 128, 256]),
            max_num_seqs=chance.choice([4, 8, 16]),
            max_model_len=512,
            expert_timeout_s=chance.choice([8.0, 30.0]),
        ),
        shard=ShardCosts(batch_s=0.1 if scales else 0.02),
        clocks_apart_s=chance.choice([0.0, 500.0]),
        latency_s=chance.choice([0.0001, 0.0005, 0.003]),
    )
    busy_s = 0.4 * until if scales else until  # in which requests come one after the other, and hardly any later
    number = 60 if scales else chance.choice([8, 16, 24])
    arrivals = tuple(
        Arrival(
            at=round(chance.uniform(0.0, until if index % 8 == 0 else busy_s), 3),
            name=f"r{index}",
            prompt_tokens=chance.choice([4, 20, 60, 200]),
            output_tokens=chance.choice([1, 8, 20, 50]),
            prefix=chance.randrange(3),
            tenant=chance.choice(["", "", "other"]),
            timeout_s=300.0,
        )
        for index in range(number)
    )
    faults = draw(chance, chance.choice([0, 2, 4] if scales else [2, 5, 9, 14]), until)
    later = EventQueue(seed).chance("later faults")
    faults += draw(later, later.choice([0, 0, 1, 3]), until, LATER_KINDS)
    return Scenario(
        seed,
        spec,
        tuple(sorted(arrivals, key=lambda one: one.at)),
        tuple(sorted(faults, key=lambda one: one.at)),
        kind != "harsh",
        until,
    )


class Run:
    """A scenario as it happens."""

    def __init__(self, given: Scenario, *, watched: bool = True, invariants: Invariants | None = None) -> None:
        """`watched`: events are digested and the last ones remembered, for a tenth of the time."""
        self.given = given
        self._watched = watched
        self.queue = EventQueue(given.seed)
        self.invariants = invariants or Invariants()
        self.fleet = self.invariants.fleet = Fleet(self.queue, given.spec, self.invariants)
        self.serve = Serve(self.fleet, self.invariants.scaled, self.invariants.loaded)
        self.faults = Faults(self.fleet, self.invariants.died_in_masses, gently=given.gently)
        self.digest = 0
        self.last_events: deque[tuple[float, str]] = deque(maxlen=LAST_EVENTS)
        self._moment, self._at_once = -1.0, 0

    def outcome(self) -> Outcome:
        """Run it to its end, or to what does not hold."""
        violation = None
        try:
            self._run()
        except Exception as error:
            cause = error if isinstance(error, Violation) or error.__cause__ is None else error.__cause__
            violation = str(cause) if isinstance(cause, Violation) else f"{type(cause).__name__}: {cause}"
        self._end_all()
        invariants = self.invariants
        return Outcome(
            violation,
            self.queue.now,
            self.queue.num_events,
            self.digest,
            num_requests=invariants.num_requests,
            num_failed=invariants.num_failed,
            num_tokens=invariants.num_tokens,
            num_attempts=invariants.num_attempts,
            num_answers=invariants.num_answers,
            num_hedges=invariants.num_hedges,
            num_faults=len(self.faults.happened),
            happened=[f"{at:12.6f}  {what}" for at, what in self.faults.happened],
            last_events=[f"{at:12.6f}  {what}" for at, what in self.last_events],
        )

    def _run(self) -> None:
        queue, given, invariants = self.queue, self.given, self.invariants
        if self._watched:
            queue.watch = self._see
        self.serve.start()
        coming = deque(given.arrivals)
        for fault in given.faults:
            queue.at(fault.at, self.faults.happen, fault)
        while queue.now < given.until:
            until = min(given.until, queue.now + 5.0)
            while coming and coming[0].at <= until:
                queue.at(coming[0].at, self.fleet.send_arrival, coming.popleft())
            queue.run(until, invariants.check)
            invariants.check_dials()
        invariants.check_requests()
        most_s = max((one.timeout_s for one in given.arrivals), default=0.0)
        end = given.until + most_s
        while queue.now < end and not self._is_quiet():
            queue.run(min(end, queue.now + 5.0), invariants.check)
            invariants.check_requests()
            invariants.check_dials()
        queue.run(queue.now + SETTLE_S, invariants.check)
        invariants.check_end()

    def _is_quiet(self) -> bool:
        return not any(self.fleet.can_answer(name, later=True) for name in self.invariants.clients)

    def _see(self, event: Event) -> None:
        what = described(event)
        if event.at == self._moment:
            self._at_once += 1
            if self._at_once > MOST_EVENTS_AT_ONCE:
                raise Violation(f"it spins: {what}")
        else:
            self._moment, self._at_once = event.at, 0
        self.digest = crc32(f"{event.at!r} {what}".encode(), self.digest)
        self.last_events.append((event.at, what))

    def _end_all(self) -> None:
        """What its coroutines hold is let go."""
        fleet = self.fleet
        for process in [
            *(g.process for g in fleet.gateways.values()),
            *(c.process for c in fleet.coordinators.values()),
        ]:
            process.loop.end()


def described(event: Event) -> str:
    """Whose event it is, and what happens, in the same words in every run."""
    action, arguments = event.action, event.arguments
    whose = "" if event.owner is None else f"{event.owner}: "
    if arguments and isinstance(arguments[0], Context):  # a callback of its loop
        action = arguments[1]
    name = getattr(action, "__qualname__", None) or type(action).__name__
    if name == "Connection._arrive":
        name = f"hears {getattr(arguments[1], '__qualname__', '')}"
    return whose + str(name)


def run(given: Scenario) -> Outcome:
    """To the bit the same for the same scenario."""
    return Run(given).outcome()


def without(given: Scenario, kept: Sequence[Arrival | Fault]) -> Scenario:
    """The same with only these requests and faults."""
    return replace(
        given,
        arrivals=tuple(one for one in kept if isinstance(one, Arrival)),
        faults=tuple(one for one in kept if isinstance(one, Fault)),
    )
