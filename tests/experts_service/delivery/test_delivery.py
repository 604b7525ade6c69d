"""Deliveries over a carrier that is simulated, in any order of answers, losses, late answers and changes of the table.

Time is the simulation's, so a dispatch of thirty seconds takes a millisecond here. Hypothesis chooses what each
replica does with each attempt and what happens to the table meanwhile; what has to hold is checked at every call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.telemetry.metrics import DispatchCounts
from experts_service.delivery.delivery import (
    ANSWERED,
    CANCELLED,
    FAILED,
    MAX_NOT_FINITE,
    MAX_RAISED,
    POSTED,
    SILENCES_PER_TIMEOUT,
    Attempt,
    Deliveries,
    Delivery,
)
from experts_service.routing_table import Deployment, Replica, RoutingTable

TIMEOUT_S = 30.0
NAMES = ("a", "b", "c")
DEPLOYMENT = Deployment("model", "expert-0")


@dataclass
class World:
    """A clock, a table whose waits take simulated time, and what is to happen when."""

    now: float = 1000.0
    events: list[tuple[float, int, Any]] = field(default_factory=list)  # when, in which order, what

    def at(self, when: float, do: Any) -> None:
        self.events.append((when, len(self.events), do))

    def advance(self, until: float) -> bool:
        """To the next event, if it comes before `until`. Whether one happened."""
        due = min(self.events, default=None, key=lambda event: event[:2])
        if due is None or due[0] > until:
            self.now = max(self.now, until)
            return False
        self.events.remove(due)
        self.now = max(self.now, due[0])
        due[2]()
        return True


class Table(RoutingTable):
    """Nobody else's thread changes it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def wait_for_change(self, epoch: int, timeout_s: float) -> bool:
        until = self._world.now + timeout_s
        while self.epoch <= epoch and self._world.advance(until):
            pass
        return self.epoch > epoch


class Sent(Attempt):
    """An attempt with what the simulation knows of it."""

    __slots__ = ("delivery", "is_accepted", "number", "spare")

    def accept(self) -> None:
        assert self.state is ANSWERED, "an answer that has not come cannot count"
        assert self.delivery.live == [], "nobody may write into the place of an answer that counts"
        assert not self.is_accepted, "once"
        self.is_accepted = True


class Simulation:
    """Carrier and routes of one group."""

    def __init__(self, world: World, plans: dict[str, list[tuple[str, float]]]) -> None:
        """`plans`: what each replica does with one attempt after the other; the last for all others. After how long."""
        self.world = world
        self.plans = plans
        self.table = Table(world)
        self.cut_off: set[str] = set()  # replicas without a connection
        self.sent: dict[str, list[Sent]] = defaultdict(list)  # by the rows that were posted
        self.deliveries: dict[str, Delivery[str, Sent]] = {}
        self.num_polls = 0
        self.shared: Deliveries[str, Sent] = Deliveries(
            self, self, self.table, {0: DEPLOYMENT}, TIMEOUT_S, {0: DispatchCounts()}, clock=lambda: world.now
        )

    def deliver(self, names: Sequence[str], not_finite: int = 0) -> dict[str, Delivery[str, Sent]]:
        """Deliver these rows at the same time; of each, the first answers so often are not taken."""
        deadline = self.world.now + TIMEOUT_S
        for name in names:
            self.deliveries[name] = Delivery(self.shared, 0, 8, name, deadline)
            self.deliveries[name].post(self.world.now)
        waiting = list(self.deliveries.values())
        while waiting:
            for delivery, at in self.shared.settle(waiting):
                assert at <= deadline + 1e-9
                assert delivery.is_over
            waiting = [delivery for delivery in waiting if not_finite and delivery.reject()]
            not_finite -= 1
        return self.deliveries

    @property
    def epoch(self) -> int:
        return self.table.epoch

    def reachable(self, group: int) -> tuple[Replica, ...]:
        replicas = self.table.replicas(DEPLOYMENT)
        wanted = [replica for replica in replicas if not replica.suspected] or replicas
        return tuple(replica for replica in wanted if replica.replica_id not in self.cut_off)

    def refusal(self, group: int) -> tuple[Replica | None, str]:
        return next(((replica, "refused") for replica in self.table.replicas(DEPLOYMENT)), (None, ""))

    def owed(self, replica_id: str) -> int:
        return sum(a.state is POSTED for of in self.sent.values() for a in of if a.replica.replica_id == replica_id)

    def post(self, rows: str, replica: Replica, epoch: int, number: int, remaining_s: float, *, spare: bool) -> Sent:
        before = self.sent[rows]
        assert number == len(before) + 1, "every attempt has a number of its own"
        assert remaining_s > 0
        assert sum(one.state is POSTED for one in before) <= 1, "a first one and a hedge, no more"
        assert spare or all(one.state is not POSTED for one in before), "two would write into one place"
        attempt = Sent(replica, epoch)
        attempt.delivery, attempt.number, attempt.spare, attempt.is_accepted = (
            self.deliveries[rows],
            number,
            spare,
            False,
        )
        before.append(attempt)
        plan = self.plans[replica.replica_id]
        what, after_s = plan.pop(0) if len(plan) > 1 else plan[0]
        if replica.replica_id in self.cut_off:
            what, after_s = "fails", 0.0
        if what == "fails" and after_s == 0.0:
            attempt.fail("it was lost at once")
        elif what != "is silent":
            self.world.at(self.world.now + after_s, lambda: self._happens(attempt, what))
        return attempt

    def poll(self, attempts: Sequence[Sent], until: float, soon: float, *, each: bool) -> None:
        self.num_polls += 1
        assert self.num_polls < 5000, "it spins"
        assert attempts
        assert all(attempt.state is POSTED for attempt in attempts)
        while self.world.advance(until):
            if any(attempt.state is not POSTED for attempt in attempts):
                return

    def cancel(self, attempt: Sent, *, silent: bool = False) -> None:
        assert attempt.state is POSTED
        attempt.state = CANCELLED

    def _happens(self, attempt: Sent, what: str) -> None:
        if attempt.state is not POSTED:
            return  # late: nobody waits for it
        if what == "answers":
            attempt.state = ANSWERED
            return
        attempt.raised = what == "raises"
        attempt.fail(what)


def check(simulation: Simulation) -> None:
    """When all is over: each row was answered once or not at all, and nothing is left."""
    for name, delivery in simulation.deliveries.items():
        assert delivery.is_over
        assert (delivery.answer is not None) != delivery.is_hopeless
        accepted = [attempt for attempt in simulation.sent[name] if attempt.is_accepted and attempt.state is ANSWERED]
        assert accepted == ([] if delivery.answer is None else [delivery.answer])
        assert all(attempt.state is not POSTED for attempt in simulation.sent[name])


def world_of(plans: dict[str, list[tuple[str, float]]]) -> Simulation:
    simulation = Simulation(World(), plans)
    simulation.table.publish(DEPLOYMENT, [Replica(name, name, "test", 0, "f") for name in plans])
    return simulation


SECONDS = st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.5, 9.0, 12.0, 40.0])
DEEDS = st.tuples(st.sampled_from(["answers", "answers", "fails", "is silent", "raises"]), SECONDS)
PLANS = st.fixed_dictionaries({name: st.lists(DEEDS, min_size=1, max_size=6) for name in NAMES})
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 35), st.sampled_from(["leaves", "comes", "is cut off", "is connected", "is suspected"]),
        st.sampled_from(NAMES),
    ),
    max_size=8,
)  # fmt: skip


def plan_changes(simulation: Simulation, changes: Sequence[tuple[float, str, str]]) -> None:
    table = simulation.table

    def do(what: str, name: str) -> None:
        present = list(table.replicas(DEPLOYMENT))
        if what == "leaves":
            table.publish(DEPLOYMENT, [replica for replica in present if replica.replica_id != name])
        elif what == "comes" and all(replica.replica_id != name for replica in present):
            table.publish(DEPLOYMENT, [*present, Replica(name, name, "test", 0, "f")])
        elif what == "is cut off":
            simulation.cut_off.add(name)
        elif what == "is connected":
            simulation.cut_off.discard(name)
            table.renew(DEPLOYMENT, name)
        elif what == "is suspected":
            table.suspect(DEPLOYMENT, name, table.epoch)

    for after_s, what, name in changes:
        simulation.world.at(simulation.world.now + after_s, lambda what=what, name=name: do(what, name))


@settings(max_examples=400)
@given(PLANS, CHANGES, st.integers(1, 3), st.integers(0, MAX_NOT_FINITE + 1))
def test_each_delivery_is_answered_once_or_ends_at_its_deadline(plans, changes, number, not_finite) -> None:
    simulation = world_of(plans)
    plan_changes(simulation, changes)
    simulation.deliver([f"rows {n}" for n in range(number)], not_finite)
    check(simulation)


@settings(max_examples=200)
@given(PLANS, st.integers(1, 3), st.sampled_from(NAMES))
def test_one_replica_that_answers_is_enough(plans, number, good) -> None:
    """Whatever the others do; only errors of the maths itself, which would come everywhere, are not asked on."""
    plans = {name: [deed for deed in plan if deed[0] != "raises"] or [("fails", 0.01)] for name, plan in plans.items()}
    simulation = world_of(plans | {good: [("answers", 0.01)]})
    deliveries = simulation.deliver([f"rows {n}" for n in range(number)])
    check(simulation)
    assert all(delivery.answer is not None for delivery in deliveries.values())


def test_a_group_without_replicas_is_served_as_soon_as_one_is_connected() -> None:
    simulation = world_of({"a": [("answers", 0.01)]})
    simulation.cut_off.add("a")
    plan_changes(simulation, [(20.0, "is connected", "a")])
    started = simulation.world.now
    [delivery] = simulation.deliver(["rows"]).values()
    assert delivery.answer is not None
    assert simulation.world.now - started < 20.1
    assert len(simulation.sent["rows"]) == 1


def test_another_replica_is_asked_at_once_for_an_answer_that_is_not_finite() -> None:
    simulation = world_of({name: [("answers", 0.01)] for name in NAMES})
    started = simulation.world.now
    [delivery] = simulation.deliver(["rows"], not_finite=1).values()
    first, second = simulation.sent["rows"]
    assert delivery.answer is second
    assert first.replica.replica_id != second.replica.replica_id
    assert simulation.world.now - started < 0.03


@pytest.mark.parametrize(("connected_s", "asked"), [(2.0, "ab"), (TIMEOUT_S, "aa")])
def test_another_replica_is_waited_for_after_an_answer_that_is_not_finite(connected_s: float, asked: str) -> None:
    """Not for ever: the rows themselves may be what makes the answer so."""
    simulation = world_of({name: [("answers", 0.01)] for name in "ab"})
    simulation.cut_off.add("b")
    simulation.table.suspect(DEPLOYMENT, "b", simulation.table.epoch)
    plan_changes(simulation, [(connected_s, "is connected", "b")])
    started = simulation.world.now
    [delivery] = simulation.deliver(["rows"], not_finite=1).values()
    assert delivery.answer is simulation.sent["rows"][-1]
    assert "".join(attempt.replica.replica_id for attempt in simulation.sent["rows"]) == asked
    assert simulation.world.now - started < min(connected_s, TIMEOUT_S / SILENCES_PER_TIMEOUT) + 1.0


def test_a_replica_whose_answer_was_not_finite_is_no_hedge_for_another_one() -> None:
    """It shows signs of life and is trusted again. Asked once more, it was believed (seed 3657 of the simulation)."""
    simulation = world_of({"a": [("answers", 0.01)], "b": [("answers", 5.0)]})
    simulation.world.at(simulation.world.now + 0.5, lambda: simulation.table.trust(DEPLOYMENT, "a"))
    [delivery] = simulation.deliver(["rows"], not_finite=1).values()
    assert [attempt.replica.replica_id for attempt in simulation.sent["rows"]] == ["a", "b"]
    assert delivery.answer is simulation.sent["rows"][1]


def test_what_failed_is_suspected_though_the_dispatch_ends_before_anybody_has_looked() -> None:
    """Others were waited for, in vain (seed 17135 of the simulation)."""
    simulation = world_of({"a": [("fails", 0.01)]})
    delivery = Delivery(simulation.shared, 0, 8, "rows", simulation.world.now + TIMEOUT_S)
    simulation.deliveries["rows"] = delivery
    delivery.post(simulation.world.now)
    simulation.world.advance(simulation.world.now + 1.0)
    delivery.close()
    assert [replica.suspected for replica in simulation.table.replicas(DEPLOYMENT)] == [True]


@pytest.mark.parametrize("ends", ["its own deadline", "with others"])
def test_the_only_replica_is_suspected_once_it_was_silent_for_the_whole_timeout(ends: str) -> None:
    """It never was: `/health` stayed 200, and every request waited out the timeout of a shard that was stopped."""
    simulation = world_of({"a": [("is silent", 0.0)]})
    if ends == "with others":  # their deadline, at which the dispatch ends, is this one's
        delivery = simulation.deliveries["rows"] = Delivery(simulation.shared, 0, 8, "rows", simulation.world.now + 30)
        delivery.post(simulation.world.now)
        simulation.world.now += 30
        delivery.close()
    else:
        simulation.deliver(["rows"])
        check(simulation)
    assert [replica.suspected for replica in simulation.table.replicas(DEPLOYMENT)] == [True]


@pytest.mark.parametrize(("closed_after_s", "connected_after_s"), [(29.0, 0.0), (30.0, 25.0)])
def test_a_replica_that_had_little_time_is_not_suspected(closed_after_s: float, connected_after_s: float) -> None:
    """Somebody left before the deadline, or it was asked shortly before that."""
    simulation = world_of({"a": [("is silent", 0.0)]})
    started = simulation.world.now
    delivery = simulation.deliveries["rows"] = Delivery(simulation.shared, 0, 8, "rows", started + 30)
    simulation.world.now = started + connected_after_s
    delivery.post(simulation.world.now)
    simulation.world.now = started + closed_after_s
    delivery.close()
    assert not any(replica.suspected for replica in simulation.table.replicas(DEPLOYMENT))


def test_a_suspected_replica_that_answers_is_trusted_again() -> None:
    """It was only slow: while it computes for others, it is looked at now and then, and nothing new is admitted."""
    simulation = world_of({"a": [("answers", 0.01)]})
    simulation.table.suspect(DEPLOYMENT, "a", simulation.table.epoch)
    simulation.deliver(["rows"])
    assert not any(replica.suspected for replica in simulation.table.replicas(DEPLOYMENT))


def test_the_maths_is_asked_three_times_and_no_more() -> None:
    simulation = world_of({name: [("raises", 0.001)] for name in NAMES})
    [delivery] = simulation.deliver(["rows"]).values()
    assert (delivery.answer, delivery.reason) == (None, "raises")
    assert len(simulation.sent["rows"]) == MAX_RAISED


def test_what_a_replica_says_of_the_rows_is_told_at_once() -> None:
    simulation = world_of({name: [("is silent", 0.0)] for name in NAMES})
    error = ValueError("another checkpoint")

    def refuse(attempt: Sent) -> None:
        attempt.error = error
        attempt.fail("another checkpoint")

    simulation.world.at(simulation.world.now + 0.1, lambda: refuse(simulation.sent["rows"][0]))
    [delivery] = simulation.deliver(["rows"]).values()
    assert delivery.error is error
    assert not any(replica.suspected for replica in simulation.table.replicas(DEPLOYMENT)), "it is well"
    check(simulation)


def test_what_a_hedge_says_of_the_rows_is_told_though_the_first_is_lost_at_the_same_time() -> None:
    """The loss was learned of last and stood for both: others were asked for rows that none of them takes."""
    simulation = world_of({name: [("is silent", 0.0)] for name in NAMES})
    error = ValueError("another checkpoint")

    def both_fail() -> None:
        first, second = simulation.sent["rows"]
        second.error = error
        second.fail("another checkpoint")
        first.fail("it was lost")

    simulation.world.at(simulation.world.now + 2.0, both_fail)
    [delivery] = simulation.deliver(["rows"]).values()
    assert delivery.error is error
    assert len(simulation.sent["rows"]) == 2
    check(simulation)


def test_an_answer_that_came_while_nobody_looked_is_no_reason_for_a_hedge() -> None:
    simulation = world_of({"a": [("answers", 0.01)], "b": [("answers", 0.01)]})
    delivery = simulation.deliveries["rows"] = Delivery(simulation.shared, 0, 8, "rows", simulation.world.now + 30)
    delivery.post(simulation.world.now)
    simulation.world.now += 5.0
    list(simulation.shared.settle([delivery]))
    assert len(simulation.sent["rows"]) == 1


def test_an_answer_that_was_read_for_another_delivery_is_not_slept_on() -> None:
    """Two dispatches share connections: the one that was waited for last had its answer, and slept half a second."""
    simulation = world_of({"a": [("answers", 0.01)]})
    now = simulation.world.now
    for rows in ("first", "second"):
        simulation.deliveries[rows] = Delivery(simulation.shared, 0, 8, rows, now + TIMEOUT_S)
        simulation.deliveries[rows].post(now)
    for rows in ("second", "first"):
        [(_, at)] = simulation.shared.settle([simulation.deliveries[rows]])
        assert at - now < 0.02, rows


def test_a_second_replica_is_given_a_third_of_the_timeout_as_well() -> None:
    """It was given up with the first one's time: the rows were lost, and so was what others had asked of it."""
    simulation = world_of({"a": [("fails", 9.5)], "b": [("answers", 3.0)], "c": [("is silent", 0.0)]})
    delivery = simulation.deliveries["rows"] = Delivery(
        simulation.shared, 0, 8, "rows", simulation.world.now + TIMEOUT_S
    )
    delivery.post(simulation.world.now)
    delivery._hedge_at = delivery.due_at = simulation.world.now + 9.0  # usual for so many rows
    list(simulation.shared.settle([delivery]))
    assert [one.replica.replica_id for one in simulation.sent["rows"][:2]] == ["a", "b"]
    assert delivery.answer is simulation.sent["rows"][1]
    check(simulation)


@pytest.mark.parametrize("state", [ANSWERED, FAILED, CANCELLED])
def test_a_delivery_that_is_closed_leaves_nothing_posted(state) -> None:
    simulation = world_of({"a": [("is silent", 0.0)]})
    delivery = simulation.deliveries["rows"] = Delivery(simulation.shared, 0, 8, "rows", simulation.world.now + 30)
    delivery.post(simulation.world.now)
    [attempt] = simulation.sent["rows"]
    if state is CANCELLED:
        delivery.close()
    else:
        attempt.state = state
    delivery.close()
    assert attempt.state is state
