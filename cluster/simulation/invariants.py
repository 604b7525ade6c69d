"""What has to hold at every event, whatever fails. Knows what was asked and what came back; decides nothing.

Rows: each is answered once, with what was computed from it, or its step fails by the deadline of the dispatch. Tokens:
none is lost, doubled or changed, and no request is heard of after its deadline. A stream ends with an error only where
the fleet could not serve it. Hedges stay within their budget, and what is asked again after a mass death does as well.
When all is over nobody holds anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from cluster.errors import DeadlineExceeded, MantaError, Overloaded
from cluster.messages import Request, TokenChunk
from cluster.simulation.coordinator import Coordinator, token_of
from cluster.simulation.gateway import Arrival
from cluster.simulation.lanes import MOST_DIALS, LaneAttempt, Rows
from cluster.simulation.members import RECOVERY_S, Fleet
from cluster.simulation.scaling import Averages, Scaling
from experts_service.delivery.delivery import ANSWERED, Delivery
from experts_service.delivery.replica_load import BUDGET, BURST, OVERDUE_S
from experts_service.routing_table import Replica

LATE_S = 0.2  # that something may come after its deadline: what a step under way takes
STORM_S = 30.0  # after a mass death, in which what is asked again is counted
STORM_FACTOR = 1.2
UNLEARNED_S = 5.0  # at most, until a step has learned that an attempt has failed
HELP_S = 10.0  # after which a decision is made that was due
DIALS_S = 8.0  # in which one replica is dialled less than MOST_DIALS times
ROOM = 0.9  # of the target at most, that each of fewer replicas is to carry: else a little more load has them back


class Violation(AssertionError):
    """Something does not hold. The message says what."""


@dataclass(slots=True)
class Client:
    """One request that has not ended."""

    arrival: Arrival
    request: Request
    began: float
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Asked:
    """What a coordinator has asked of shards."""

    answered: int = 0
    attempts: int = 0
    hedges: int = 0


class Invariants:
    """Told of everything that counts; raises Violation."""

    fleet: Fleet

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}  # by name, until it has its answer
        self.num_requests = self.num_failed = 0
        self.asked: dict[str, Asked] = {}
        self.num_attempts = self.num_answers = self.num_hedges = self.num_tokens = 0
        self._num_raised = 0  # answers as well, of maths that raises: who died has nothing to do with those
        self._failed: dict[tuple[str, str], tuple[float, int]] = {}  # coordinator, replica → when last, and its epoch
        self._busy_since: dict[str, float] = {}
        self._loads_at: dict[str, float] = {}  # of each deployment, when it last went down
        self._storm: tuple[float, int, int, int] | None = None  # until when; attempts and answers before; how many died

    @property
    def _now(self) -> float:
        return self.fleet.queue.now

    # Clients

    def began(self, arrival: Arrival, request: Request) -> None:
        self.num_requests += 1
        self.clients[arrival.name] = Client(arrival, request, self._now)

    def received(self, name: str, chunk: TokenChunk) -> None:
        client = self.clients.get(name)
        if client is None:
            raise Violation(f"{name} got tokens after its end")
        tokens, request = client.tokens, client.request
        if chunk.first_position != len(tokens):
            raise Violation(f"{name} has {len(tokens)} tokens and got those from {chunk.first_position} on")
        for token in chunk.token_ids:
            last = tokens[-1] if tokens else request.prompt_token_ids[-1]
            if token != token_of(request, len(tokens), last):
                raise Violation(f"token {len(tokens)} of {name} is another")
            tokens.append(token)
        self.num_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None and len(tokens) != request.sampling.max_tokens:
            raise Violation(f"{name} ended with {len(tokens)} tokens: too few, or many")

    def ended(self, name: str, error: MantaError | None) -> None:
        client = self.clients.pop(name, None)
        if client is None:
            raise Violation(f"{name} ended twice")
        self.fleet.clients_of.pop(name, None)
        self.num_failed += error is not None
        if error is None:
            wanted = client.request.sampling.max_tokens
            if len(client.tokens) != wanted:
                raise Violation(f"{name} ended with {len(client.tokens)} of {wanted} tokens")
        elif not isinstance(error, Overloaded) or client.tokens:
            could = self.fleet.was_served(since=client.began - RECOVERY_S)
            within = isinstance(error, DeadlineExceeded)
            self._require(
                not could or (within and not self.fleet.spec.promises_deadlines),
                f"{name} failed though one replica of each group and one coordinator could answer: {error!r}",
            )

    # Coordinators

    def posted(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        asked = self._of(coordinator)
        asked.attempts += 1
        self.num_attempts += 1
        self._check_trust(coordinator, attempt)
        if not attempt.is_spare:
            return
        self.num_hedges += 1
        first = next(d.first for d in coordinator.under_way if d.first is not None and d.first.rows is attempt.rows)
        if coordinator.process.clock() - first.posted_at < OVERDUE_S - 1e-9:
            asked.hedges += 1
            most = BURST + BUDGET * asked.answered
            self._require(
                asked.hedges <= most + 1e-6,
                f"{coordinator.process} has hedged {asked.hedges} times, {most:.2f} at most",
            )

    def failed(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        self._num_raised += attempt.reason == "raises"
        replica_id = attempt.replica.replica_id
        known = coordinator.table.replicas(self.fleet.deployments[attempt.replica.group])
        if all(one.epoch <= attempt.epoch for one in known if one.replica_id == replica_id):  # else it is old news
            self._failed[coordinator.process.name, replica_id] = (self._now, coordinator.table.epoch)

    def _check_trust(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        """Who has failed is asked last, until there is a sign of life; and nobody is dialled all the time."""
        replica = attempt.replica
        name, replica_id = coordinator.process, replica.replica_id
        at, epoch = self._failed.get((name.name, replica_id), (float("inf"), 0))
        if self._now - at > UNLEARNED_S and replica.epoch <= epoch:
            others = [one for one in coordinator.routes.reachable(replica.group) if one.replica_id != replica_id]
            trusted = any(not one.suspected for one in others)
            self._require(
                not trusted, f"{name} asks {replica_id}, which failed and showed no sign of life, before others"
            )

    def accepted(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        if attempt.state is not ANSWERED:
            raise Violation("an answer that has not come was taken")
        if attempt.tag != attempt.rows.tag:
            raise Violation(f"the answer to {attempt.tag} was taken for {attempt.rows.tag}")
        for delivery in coordinator.under_way:
            if attempt in (delivery.first, delivery.second) and delivery.answer is not None:
                raise Violation(f"an answer to {attempt.tag} was taken, and there was one")
        asked = self._of(coordinator)
        asked.answered += 1
        self.num_answers += 1

    def delivered(self, coordinator: Coordinator, delivery: Delivery[Rows, LaneAttempt], now: float) -> None:
        if (delivery.answer is None) != delivery.is_hopeless:
            raise Violation("a delivery is over, and has no end or two")
        if delivery.live:
            raise Violation("a delivery is over, and an attempt of it is posted")
        if now > delivery.deadline + LATE_S:
            stopped_at = self.fleet.stopped_at.get(coordinator.process, -1.0)
            self._require(
                self._now - stopped_at <= LATE_S, f"a delivery ended {now - delivery.deadline:.2f} s past its deadline"
            )

    def combined(self, deliveries: Sequence[Delivery[Rows, LaneAttempt]]) -> None:
        """All rows of a layer are there."""
        for delivery in deliveries:
            answer = delivery.answer
            if answer is None:
                raise Violation("rows without an answer were combined")
            if answer.tag != answer.rows.tag:
                raise Violation("rows were combined with others' answers")

    def stepped(self, coordinator: Coordinator) -> None:
        try:
            if self.fleet.spec.checks_blocks:
                coordinator.scheduler.check(coordinator.sequences.values())
        except AssertionError as error:
            raise Violation(f"{coordinator.process}: {error}") from error

    def suspected(self, coordinator: Coordinator, replica: Replica, epoch: int) -> None:
        """Bad news of an earlier connection says nothing about this one."""
        self._require(
            replica.epoch <= epoch,
            f"{coordinator.process} suspects {replica.replica_id}, which was connected or trusted after what failed",
        )

    def scaled(self, scaling: Scaling, wanted: int, loads: Averages) -> None:
        """Serve follows a policy's word. Up again soon after down, though there is no more to do, is to and fro."""
        name, before, target = scaling.name, scaling.target, scaling.target_load
        total = sum(load for load, _ in loads.values())
        if wanted < before:
            self._require(
                total <= ROOM * target * wanted + 1e-6 or len(loads) < before,
                f"{name} goes from {before} to {wanted} replicas with a load of {total:.2f}, of {target} each",
            )
            self._loads_at[name] = total
            return
        changed_at, way = scaling.changed
        waits = sum(waiting for _, waiting in loads.values()) > scaling.max_waiting * len(loads)
        if way < 0 and not waits and self._now - changed_at < scaling.bounds.downscale_delay_s:
            self._require(
                total > 1.25 * self._loads_at[name],
                f"{name} went to {before} replicas {self._now - changed_at:.0f} s ago, now to {wanted}, with a load of "
                f"{total:.2f} after {self._loads_at[name]:.2f}",
            )

    def loaded(self, scaling: Scaling, loads: Averages) -> None:
        """Every second: whoever has clearly too much to do for long gets help."""
        name = scaling.name
        total = sum(load for load, _ in loads.values())
        few = scaling.target < scaling.bounds.max_replicas
        if not few or total <= 1.2 * scaling.target_load * scaling.target:
            self._busy_since.pop(name, None)
            return
        seconds = self._now - self._busy_since.setdefault(name, self._now)
        self._require(
            seconds <= scaling.bounds.upscale_delay_s + HELP_S,
            f"{name} has {scaling.target} replicas and for {seconds:.0f} s a load of {total:.2f}, and gets no more",
        )

    def died_in_masses(self, number: int) -> None:
        """From now on what is asked again is counted."""
        self._check_storm()
        if self._storm is None:
            self._storm = (self._now + STORM_S, self.num_attempts, self.num_answers + self._num_raised, number)
            self.fleet.note_change()

    # At every event

    def check(self) -> None:
        """What can be seen at any moment: after each event from the moment on from which there is something to see."""
        self._check_storm()
        fleet = self.fleet
        if fleet.queue.now >= fleet.news_from:
            fleet.note_service()
        fleet.queue.look_from = min(fleet.news_from, inf if self._storm is None else self._storm[0])

    def check_dials(self) -> None:
        """Now and then: nobody dials all the time."""
        for coordinator in self.fleet.coordinators.values():
            for replica_id, dials in coordinator.lanes.dials.items():
                if len(dials) == MOST_DIALS and (seconds := dials[-1] - dials[0]) < DIALS_S:
                    raise Violation(
                        f"{coordinator.process} has dialled {replica_id} {MOST_DIALS} times in {seconds:.1f} s"
                    )

    def check_requests(self) -> None:
        """Now and then: whoever is past the deadline has been told."""
        for name, client in self.clients.items():
            if self.fleet.can_answer(name):
                late_s = self._now - client.began - client.arrival.timeout_s
                self._require(late_s < 1.0, f"{name} is past its deadline by {late_s:.1f} s, and has not been told")

    def _check_storm(self) -> None:
        if self._storm is None:
            return
        until, attempts, answers, died = self._storm
        if self._now < until:
            return
        self._storm = None
        asked, useful = self.num_attempts - attempts, self.num_answers + self._num_raised - answers
        free = died * max(1, len(self.fleet.coordinators)) + BURST * len(self.fleet.coordinators)
        self._require(
            asked <= STORM_FACTOR * useful + free,
            f"{asked} attempts were made in the {STORM_S:g} s after {died} shards died, and {useful} answered",
        )

    # At the end

    def check_end(self) -> None:
        """Everybody has left: nobody holds anything."""
        fleet = self.fleet
        self.check_requests()
        for name in self.clients:
            self._require(not fleet.can_answer(name), f"{name} has no end")
        for coordinator in fleet.coordinators.values():
            whose = coordinator.process
            self._require(coordinator.is_idle, f"{whose} still works, and nobody waits")
            blocks = coordinator.scheduler.block_manager
            self._require(not blocks.num_used_blocks, f"{whose} has lost {blocks.num_used_blocks} blocks")
            for delivery in coordinator.under_way:
                self._require(not delivery.live, f"{whose} has an attempt that nobody waits for")
            known = {r.replica_id for d in fleet.deployments.values() for r in coordinator.table.replicas(d)}
            routes = coordinator.routes
            has_looked = routes._epoch == coordinator.table.epoch and not routes._departing  # one that is idle does not
            for replica_id, lane in coordinator.lanes.all():
                self._require(not lane.outstanding, f"{whose}'s lane to {replica_id} has a slot in use")
                self._require(
                    not has_looked or replica_id in known, f"{whose} keeps a lane to {replica_id}, which has left"
                )
            for deployment in fleet.deployments.values():
                for replica in coordinator.table.replicas(deployment):
                    healthy = fleet.healthy_for(replica.replica_id) > 2 * RECOVERY_S
                    self._require(
                        not (replica.suspected and healthy),
                        f"{whose} still suspects {replica.replica_id}, which is well",
                    )
            self._require(not coordinator._waiting, f"{whose} has requests that nobody waits for")
            for outbox in coordinator.outboxes._outboxes.values():
                self._require(not outbox._outgoing, f"{whose} has tokens for requests that have ended")
        for gateway in fleet.gateways.values():
            self._require(not gateway.inbox._queues, f"{gateway.process} has queues of requests that have ended")
            self._require(not gateway.table._places, f"{gateway.process} knows places of requests that have ended")

    def _of(self, coordinator: Coordinator) -> Asked:
        return self.asked.setdefault(coordinator.process.name, Asked())

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise Violation(message)
