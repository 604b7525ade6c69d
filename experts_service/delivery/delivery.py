"""One group's rows on their way: who is asked, who is asked as well, and when it is in vain. Knows no bytes and no Ray.

    POSTED ──┬── ANSWERED     the carrier has the whole answer
             ├── FAILED       no answer will come that can be taken
             └── CANCELLED    nobody waits for it any more

A carrier posts attempts and says what becomes of them; a delivery decides. It posts to the best replica that can be
reached. A replica that fails is suspected, and another one is asked, or the same one again after a pause. One that
takes far longer than usual is hedged: a second one is asked for the same rows, and the first answer counts. One that is
silent for a third of the timeout is given up where there is another; where there is none it is waited for until the
deadline, and suspected then.

    delivery.post(now)                                # the first attempt
    for over, at in deliveries.settle([delivery], …): # polls the carrier, and has each delivery react to what it says
        over.answer                                   # None: it could not be delivered

What holds in any order of answers, losses, late answers and changes of the table: one answer is taken, once, and only
that of an attempt that was posted for these rows; when a delivery is over, none of its attempts is posted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

from cluster.telemetry.metrics import DispatchCounts
from experts_service.delivery.replica_load import OVERDUE_S, SPLIT_ROWS, ReplicaLoads
from experts_service.routing_table import Deployment, Replica, RoutingTable

MAX_ATTEMPTS = 200  # of one delivery; its deadline comes first unless shards fail at once
MAX_NOT_FINITE = 2  # answers that are not taken; then the model itself is not finite there
MAX_RAISED = 3  # errors of the maths itself: the same rows would fail everywhere
SILENCES_PER_TIMEOUT = 3  # a replica that is silent for this part of the timeout is given up, if there is another
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between attempts, when there is no other replica to ask

Rows = TypeVar("Rows")  # what a carrier needs to post them
Rows_contra = TypeVar("Rows_contra", contravariant=True)
A = TypeVar("A", bound="Attempt")  # a carrier's own attempts


class State(Enum):
    """What became of an attempt."""

    POSTED = auto()
    ANSWERED = auto()
    FAILED = auto()
    CANCELLED = auto()


POSTED, ANSWERED, FAILED, CANCELLED = State  # a hot path looks at them


class Attempt:
    """One replica is asked for the rows of one delivery. Carriers make them, add what they need, and set the state."""

    posted_at = 0.0
    state: State = POSTED
    reason = ""  # why it failed
    raised = False  # whether the maths did, on the replica
    error: Exception | None = None  # what the replica says of the rows: no other would take them

    def __init__(self, replica: Replica, epoch: int) -> None:
        """`epoch`: of the routing table when the replica was chosen."""
        self.replica = replica
        self.epoch = epoch

    def fail(self, reason: str) -> None:
        """No answer will come, or none that can be taken."""
        self.state, self.reason = FAILED, reason

    def accept(self) -> None:
        """Its answer is the one that counts: it has to be where the dispatch reads it when this returns."""


class Carrier(Protocol[Rows_contra, A]):
    """What moves bytes between this process and the replicas."""

    def post(
        self, rows: Rows_contra, replica: Replica, epoch: int, number: int, remaining_s: float, *, spare: bool
    ) -> A:
        """Ask a replica; does not wait. An attempt that could not even start has failed.

        `number`: of the attempt in its delivery. `spare`: another attempt may be writing where the answer belongs.
        """

    def poll(self, attempts: Sequence[A], until: float, soon: float, *, each: bool) -> None:
        """Move bytes until the state of one of `attempts` changes, or `until` on the monotonic clock.

        `attempts` are posted. Whatever has come is read, however late it is. Until `soon` this need not sleep. Unless
        the moment of `each` answer counts, it may return when some of them have come.
        """

    def cancel(self, attempt: A, *, silent: bool = False) -> None:
        """Nobody waits for this one: what comes of it later is written nowhere. `silent`: its replica says nothing."""


class Routes(Protocol):
    """Which replicas can be reached."""

    def reachable(self, group: int) -> tuple[Replica, ...]:
        """Those to choose from: the trusted ones, or where there is none, those that are suspected."""

    def refusal(self, group: int) -> tuple[Replica | None, str]:
        """Where none can be reached: one that has refused, if one has; and why, as far as that is known."""

    def owed(self, replica_id: str) -> int:
        """Attempts that a replica has not answered, also those that nobody waits for any more."""


class Deliveries(Generic[Rows, A]):
    """What all deliveries of one coordinator share. Used by one thread, the engine's."""

    def __init__(
        self,
        carrier: Carrier[Rows, A],
        routes: Routes,
        table: RoutingTable,
        deployments: Mapping[int, Deployment],
        timeout_s: float,
        counts: Mapping[int, DispatchCounts],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.carrier = carrier
        self.routes = routes
        self.table = table
        self.deployments = deployments  # group → its deployment
        self.timeout_s = timeout_s
        self.counts = counts
        self.clock = clock
        self.loads = ReplicaLoads()
        self.answers_soon = False  # whether those of the last dispatch came while they were looked for
        self._epoch = -1
        self._ids: dict[int, tuple[tuple[Replica, ...] | None, set[str]]] = {}  # of replicas, as the table had them

    def settle(
        self, waiting: Sequence[Delivery[Rows, A]], soon: float = 0.0
    ) -> Iterator[tuple[Delivery[Rows, A], float]]:
        """Each of `waiting` with the moment when it was over: it has its answer, or there will be none.

        Until `soon` answers are looked for without sleeping.
        """
        while waiting:
            live, until, each = self.awaited(waiting)
            if live:
                self.carrier.poll(live, until, soon, each=each)
            else:
                self.table.wait_for_change(self.table.epoch, max(0.0, until - self.clock()))
            now = self.clock()
            still = []
            for delivery in waiting:
                delivery.step(now)
                if delivery.answer is not None or delivery.is_hopeless:
                    yield delivery, now
                else:
                    still.append(delivery)
            waiting = still

    def awaited(self, waiting: Sequence[Delivery[Rows, A]]) -> tuple[list[A], float, bool]:
        """What each of `waiting` can go on with: attempts that are posted, or where there is none, the table.

        Second, at what moment it goes on in any case, 0: at once. Third, whether the moment of each answer counts.
        """
        live: list[A] = []
        until, each = math.inf, False
        for delivery in waiting:
            each = each or delivery.is_measured
            until = min(until, delivery.due_at, delivery.deadline)
            for attempt in (delivery.first, delivery.second):
                if attempt is None:
                    continue
                if attempt.state is POSTED:
                    live.append(attempt)
                else:  # the carrier read its answer, or lost it, while it posted or read those of others
                    until = 0.0
        if not live:
            until = min(until, self.clock() + LONGEST_PAUSE_S)
        return live, until, each

    def look_at_table(self) -> None:
        """Forget what is known of replicas that left."""
        if self._epoch == self.table.epoch:
            return
        self._epoch = self.table.epoch
        has_left = False
        for group, deployment in self.deployments.items():
            replicas, before = self.table.replicas(deployment), self._ids.get(group, (None, set()))
            if replicas is not before[0]:
                ids = {replica.replica_id for replica in replicas}
                has_left = has_left or not before[1] <= ids
                self._ids[group] = replicas, ids
        if has_left:
            self.loads.forget(set().union(*(ids for _, ids in self._ids.values())))

    def suspect(self, group: int, replica: Replica, epoch: int) -> None:
        """Choose it last from now on, unless it was connected again since `epoch`."""
        self.table.suspect(self.deployments[group], replica.replica_id, epoch)


class Delivery(Generic[Rows, A]):
    """The rows of one group, or of the part of them that one replica is to run."""

    __slots__ = (
        "_again_at", "_epoch", "_hedge_at", "_is_timed", "_num_attempts", "_num_raised", "_pause_s", "_rejected",
        "_replica_id", "_rows", "_shared", "_silent_at", "answer", "deadline", "due_at", "error", "first", "group",
        "is_hopeless", "num_rows", "reason", "second",
    )  # fmt: skip

    def __init__(
        self,
        shared: Deliveries[Rows, A],
        group: int,
        num_rows: int,
        rows: Rows,
        deadline: float,
        replica_id: str | None = None,
    ) -> None:
        """`replica_id`: whose share these rows are; it is asked first."""
        self.group = group
        self.num_rows = num_rows
        self.first: A | None = None
        self.second: A | None = None  # the hedge
        self.answer: A | None = None  # the one that counts
        self.is_hopeless = False  # asking again would be in vain
        self.error: Exception | None = None  # what a replica says of the rows, if that is why
        self.reason = "no replica is known"  # for what happened last
        self._shared = shared
        self._rows = rows
        self._replica_id = replica_id
        self.deadline = deadline
        self.due_at = 0.0  # when `step` has something to do, whatever the attempts do
        self._epoch = -1  # of the table, when the last attempt failed
        self._hedge_at = self._silent_at = 0.0
        self._is_timed = False  # whether its replica is one of several, whose speeds are compared
        self._num_attempts = self._num_raised = 0
        self._rejected: tuple[str, ...] = ()  # whose answers were not finite, by replica id
        self._again_at = 0.0  # when they may be asked again though there are others, which nobody has reached
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_over(self) -> bool:
        return self.answer is not None or self.is_hopeless

    @property
    def is_measured(self) -> bool:
        """Whether the time of its answer says how fast a replica is, which others are compared with."""
        return self._is_timed and self.num_rows >= SPLIT_ROWS

    @property
    def live(self) -> list[A]:
        """The attempts that are posted."""
        return [attempt for attempt in (self.first, self.second) if attempt is not None and attempt.state is POSTED]

    def post(self, now: float) -> None:
        """Ask the best replica that can be reached."""
        shared, group = self._shared, self.group
        replicas = self._to_choose_from(now)
        if not replicas:
            replica, reason = shared.routes.refusal(group)
            self.reason = reason or self.reason
            if replica is not None:
                shared.suspect(group, replica, shared.table.epoch)
            self._put_off(now)
            return
        replica, patience_s = replicas[0], OVERDUE_S  # another may be reachable by then
        if len(replicas) > 1:
            self._is_timed = True
            own = [one for one in replicas if one.replica_id == self._replica_id] if self._replica_id else []
            replica = own[0] if own else shared.loads.choose(replicas, shared.routes.owed)
            patience_s = shared.loads.patience_s(group, self.num_rows, self._replica_id if own else None)
        self._replica_id = None  # if it fails, whoever is best
        self._begin(self._post(replica, now, spare=False), now, patience_s)

    def adopt(self, attempt: A, posted_at: float) -> None:
        """This one was posted, to the only replica that could be reached."""
        self._num_attempts = 1
        attempt.posted_at = posted_at
        self._begin(attempt, posted_at, OVERDUE_S)

    def _begin(self, first: A, now: float, patience_s: float) -> None:
        self.first = first
        self._hedge_at = now + patience_s
        self._silent_at = now + self._shared.timeout_s / SILENCES_PER_TIMEOUT
        self.due_at = now if first.state is FAILED else min(self._hedge_at, self._silent_at)

    def step(self, now: float) -> None:
        """React to what became of the attempts, and to the time."""
        first, second = self.first, self.second
        if first is not None and first.state is ANSWERED:
            self._take(first, second, now)
            return
        if second is not None and second.state is ANSWERED:
            self._take(second, first, now)
            return
        if second is not None and second.state is FAILED:
            self._learn(second)
            self.second = second = None
        if first is not None and first.state is FAILED:
            self._learn(first)
            failed, first = first, second
            self.first, self.second = second, None
            if first is not None:
                self._silent_at = first.posted_at + self._shared.timeout_s / SILENCES_PER_TIMEOUT
                self.due_at = min(self._hedge_at, self._silent_at)
            elif not self.is_hopeless:
                self._epoch = self._shared.table.epoch
                if self._others(failed.replica):
                    self.due_at = now
                else:
                    self._put_off(now)
        if now >= self.deadline and not self.is_hopeless:
            self.is_hopeless = True
            self.reason = self.reason if first is None else "it did not answer in time"
        if self.is_hopeless:
            self.close()
        elif first is None:
            if now >= self.due_at or self._shared.table.epoch != self._epoch:
                self.post(now)
        elif now >= self.due_at:
            self._look_after(first, now)

    def reject(self) -> bool:
        """The answer is not finite, and its rows are: ask another replica, at the next step. False: often enough."""
        if self.answer is None or len(self._rejected) == MAX_NOT_FINITE:
            return False
        shared = self._shared
        self._rejected += (self.answer.replica.replica_id,)
        self._again_at = shared.clock() + shared.timeout_s / SILENCES_PER_TIMEOUT
        self.first, self.second, self.answer = self.answer, None, None
        self.first.fail("its answer is not finite")
        self.due_at = 0.0
        return True

    def _to_choose_from(self, now: float) -> tuple[Replica, ...]:
        """The replicas that can be reached; without those whose answers were not finite while others may be soon."""
        shared = self._shared
        reachable = shared.routes.reachable(self.group)
        if self._rejected and now < self._again_at:
            known = shared.table.replicas(shared.deployments[self.group])
            if any(replica.replica_id not in self._rejected for replica in known):
                return tuple(replica for replica in reachable if replica.replica_id not in self._rejected)
        return reachable

    def close(self) -> None:
        """Nobody waits for an answer. Idempotent. What nobody has looked at, as others were waited for, is learned."""
        for attempt in (self.first, self.second):
            if attempt is None:
                continue
            if attempt.state is POSTED:
                self._shared.carrier.cancel(attempt)
                if self._was_silent(attempt):
                    self._suspect(attempt)
            elif attempt.state is FAILED:
                self._suspect(attempt)

    def _post(self, replica: Replica, now: float, *, spare: bool) -> A:
        shared = self._shared
        self._num_attempts += 1
        attempt = shared.carrier.post(
            self._rows, replica, shared.table.epoch, self._num_attempts, self.deadline - now, spare=spare
        )
        attempt.posted_at = now
        return attempt

    def _take(self, answered: A, other: A | None, now: float) -> None:
        """This answer counts."""
        shared, group = self._shared, self.group
        if other is not None and other.state is POSTED:
            shared.carrier.cancel(other)
        answered.accept()
        self.answer = answered
        if self._is_timed:
            loads = shared.loads
            if other is not None and answered is self.second:
                loads.answered(other.replica.replica_id, group, self.num_rows, now - other.posted_at, beaten=True)
            loads.answered(answered.replica.replica_id, group, self.num_rows, now - answered.posted_at)
        if self._num_attempts > 1 or answered.replica.suspected:
            shared.table.trust(shared.deployments[group], answered.replica.replica_id)

    def _learn(self, failed: A) -> None:
        """From an attempt that failed."""
        self.reason = failed.reason
        self._num_raised += failed.raised
        self._suspect(failed)
        self.error = self.error or failed.error
        often = self._num_raised >= MAX_RAISED or self._num_attempts >= MAX_ATTEMPTS
        self.is_hopeless = self.error is not None or often

    def _suspect(self, failed: A) -> None:
        """Choose its replica last from now on, unless it has said of the rows what any other would."""
        if failed.error is None:
            self._shared.suspect(self.group, failed.replica, failed.epoch)

    def _was_silent(self, attempt: A) -> bool:
        """Whether the deadline is over, and its replica had time enough until then."""
        enough_s = self._shared.timeout_s / SILENCES_PER_TIMEOUT
        return self._shared.clock() >= self.deadline >= attempt.posted_at + enough_s

    def _look_after(self, first: A, now: float) -> None:
        """Its time has come: ask a second replica, or give the first one up."""
        others = self._others(first.replica)
        if self.second is None and now >= self._hedge_at:
            shared = self._shared
            overdue_at = first.posted_at + OVERDUE_S
            if now < overdue_at and not shared.loads.can_hedge:  # others that were posted meanwhile have hedged
                self._hedge_at = overdue_at
            elif not others:
                self._hedge_at = now + LONGEST_PAUSE_S
            else:
                shared.loads.hedged()
                shared.counts[self.group].hedges += 1
                self._is_timed = True
                replica = shared.loads.soonest(others, shared.routes.owed)
                self.second = self._post(replica, now, spare=True)
        if now >= self._silent_at:
            self._silent_at = now + LONGEST_PAUSE_S
            if others:
                self._shared.carrier.cancel(first, silent=True)
                first.fail("it is silent")
                self.due_at = now
                return
        if self.second is None:
            self.due_at = min(self._hedge_at, self._silent_at)
        else:
            self.due_at = now if self.second.state is FAILED else self._silent_at

    def _others(self, asked: Replica) -> list[Replica]:
        """The trusted replicas besides the one that was asked, and those whose answers were not finite."""
        reachable, useless = self._shared.routes.reachable(self.group), (asked.replica_id, *self._rejected)
        return [replica for replica in reachable if replica.replica_id not in useless and not replica.suspected]

    def _put_off(self, now: float) -> None:
        """Ask again after a pause, or when the table changes."""
        self._epoch = self._shared.table.epoch
        self.due_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
