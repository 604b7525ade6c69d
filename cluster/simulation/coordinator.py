"""A coordinator under simulated time: the product's scheduler, deliveries, routes and outboxes; its steps cost time.

One process does what two threads of the real one do: the event loop's part is coroutines, the engine's a chain of
events, one step after the other. A token follows from its request, its position and the token before it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.deadline import Deadline
from cluster.errors import CoordinatorLost, DeadlineExceeded, ExpertUnavailable, MantaError, Overloaded, Unavailable
from cluster.fairness import is_refused
from cluster.messages import Key, Request, TokenChunk, TokenStream
from cluster.simulation.lanes import Lane, LaneAttempt, LaneCarrier, Lanes, Rows
from cluster.simulation.shards import Shard
from cluster.simulation.world.network import Network
from cluster.simulation.world.processes import Process
from cluster.telemetry.metrics import DispatchCounts
from experts_service.carriers.routes import LaneRoutes
from experts_service.delivery.delivery import Deliveries, Delivery
from experts_service.delivery.replica_load import SPLIT_ROWS
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.suspects import look_at_suspects
from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.scheduler import Batch, Scheduler
from router_service.scheduling.sequence import Sequence as EngineSequence
from router_service.token_outbox import OutgoingTokens, TokenOutboxes

VOCABULARY, PRIME = 32_000, 2**31 - 1
IDLE_S = 0.001  # between two looks at sequences that are held up


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Seconds of a coordinator's own part, and how large its engine is."""

    layer_s: float = 0.06  # attention and all else between two dispatches,
    token_s: float = 0.0002  # and for each token of the step
    num_layers: int = 1  # dispatches of a step; one may stand for many
    top_k: int = 2
    microbatches: int = 1
    num_kv_blocks: int = 256
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    max_waiting: int = 64
    max_model_len: int = 2048
    expert_timeout_s: float = 30.0


def token_of(request: Request, position: int, last: int) -> int:
    """Of an answer, at a position of it, behind the token `last`."""
    mixed = (request.seed * 1_000_003 + request.choice_index) * 1_000_003 + position
    return (mixed * 1_000_003 + last) % PRIME % VOCABULARY


class EngineObserver(Protocol):
    """Is told what a coordinator does."""

    def posted(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        """A replica was asked, or could not be."""

    def accepted(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        """Its answer counts."""

    def failed(self, coordinator: Coordinator, attempt: LaneAttempt) -> None:
        """No answer that can be taken will come of it."""

    def delivered(self, coordinator: Coordinator, delivery: Delivery[Rows, LaneAttempt], now: float) -> None:
        """A delivery is over."""

    def combined(self, deliveries: Sequence[Delivery[Rows, LaneAttempt]]) -> None:
        """All answers of a layer are there."""

    def stepped(self, coordinator: Coordinator) -> None:
        """A step is booked."""

    def suspected(self, coordinator: Coordinator, replica: Replica, epoch: int) -> None:
        """A replica is, for what failed at a choice of that epoch."""


class _Table(RoutingTable):
    """Tells of replicas that become suspected."""

    def __init__(self, on_suspected: Callable[[Replica, int], object]) -> None:
        super().__init__()
        self._on_suspected = on_suspected

    def suspect(self, deployment: Deployment, replica_id: str, epoch: int) -> None:
        before = self.epoch
        super().suspect(deployment, replica_id, epoch)
        if self.epoch != before:
            for replica in self.replicas(deployment):
                if replica.replica_id == replica_id:
                    self._on_suspected(replica, epoch)


class Coordinator:
    """One replica."""

    def __init__(
        self,
        process: Process,
        costs: EngineCosts,
        deployments: Mapping[int, Deployment],
        network: Network,
        shard_of: Callable[[Replica], Shard | None],
        popularity: Sequence[float],
        observer: EngineObserver,
    ) -> None:
        """`popularity` [groups]: the part of the rows that each gets."""
        self.process = process
        self.costs = costs
        self.table = _Table(lambda replica, epoch: observer.suspected(self, replica, epoch))
        self.counts = {group: DispatchCounts() for group in deployments}
        self.lanes = Lanes(process, self.table, network, shard_of, self._wake)
        self.routes: LaneRoutes[Lane] = LaneRoutes(deployments, self.table, self.lanes, costs.expert_timeout_s, None)
        self.deliveries: Deliveries[Rows, LaneAttempt] = Deliveries(
            LaneCarrier(self.routes, self),
            self.routes,
            self.table,
            deployments,
            costs.expert_timeout_s,
            self.counts,
            process.clock,
        )
        blocks = BlockManager(costs.num_kv_blocks, costs.block_size)
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=costs.max_num_seqs,
            max_num_batched_tokens=costs.max_num_batched_tokens,
            max_model_len=costs.max_model_len,
            eos_token_ids=frozenset(),
        )
        self.outboxes = TokenOutboxes()
        self.sequences: dict[Key, EngineSequence] = {}
        self._flights: dict[int, list[Delivery[Rows, LaneAttempt]]] = {}  # by piece of the step
        self.is_in_step = False
        self._waiting_for: list[Delivery[Rows, LaneAttempt]] = []
        self._observer = observer
        self._network = network
        self._shard_of = shard_of
        self._waiting: dict[Key, OutgoingTokens] = {}
        self._arriving: Counter[str] = Counter()
        self._inbox: deque[Callable[[], None]] = deque()
        self._batch: Batch = []
        self._step = self._piece = 0
        self._sizes: list[int] = []  # tokens of each microbatch
        self._looks_at_table = False
        self._wakes_at: float | None = None
        self._timer_at = float("inf")
        self._popularity = popularity
        self._chance = process.queue.chance(process.name)
        self.table.listen(self._table_changed)
        process.loop.create_task(look_at_suspects(self.table, deployments.values(), self._lives))
        process.on_death.append(self.lanes.close)

    # The event loop's part, as `router_service.coordinator` has it

    async def generate(self, request: Request, gateway: str) -> MantaError | None:
        key = request.key
        if key in self._waiting:
            return CoordinatorLost(f"{request.request_id} is being answered already")
        try:
            with self.outboxes.of(gateway).outgoing(key) as outgoing:
                self._waiting[key] = outgoing
                try:
                    self._submit(request)
                    await outgoing.sent()
                finally:
                    del self._waiting[key]
                    self._command(lambda: self._abort(key))
        except MantaError as error:
            if isinstance(error, ExpertUnavailable):
                error.coordinator = self.process.name
            return error
        return None

    def token_stream(self, stream: TokenStream) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        assert stream.coordinator == self.process.name, "nothing sends it elsewhere here"
        return self.outboxes.of(stream.gateway).items()

    def used_fraction(self) -> float:
        blocks = self.scheduler.block_manager
        return max(
            blocks.num_used_blocks / blocks.num_blocks, len(self.scheduler.running) / self.scheduler.max_num_seqs
        )

    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + sum(self._arriving.values())

    @property
    def under_way(self) -> list[Delivery[Rows, LaneAttempt]]:
        """The deliveries of the present step that have not been combined."""
        return [delivery for flight in self._flights.values() for delivery in flight]

    @property
    def is_idle(self) -> bool:
        """Whether nobody has anything here, nor waits for anything."""
        return not (self.sequences or self._waiting or self.is_in_step or self._inbox)

    def _submit(self, request: Request) -> None:
        most = self.costs.max_waiting
        if self.num_waiting() >= most and is_refused(
            self.scheduler.waiting.counts() + self._arriving, request.cache_salt, most
        ):
            raise Overloaded(f"{most} requests wait already; try again later")
        sequence = EngineSequence(request)
        self._arriving[request.cache_salt] += 1
        self._command(lambda: self._arrive(sequence))

    async def _lives(self, replica: Replica) -> bool:
        """Whether its shard answers a call within two seconds."""
        shard = self._shard_of(replica)
        if shard is None:
            return False
        answered = self.process.loop.create_future()

        def answer() -> None:
            if not answered.done():
                answered.set_result(True)

        def give_up() -> None:
            if not answered.done():
                answered.set_result(False)

        self.process.after(2.0, give_up)
        self._network.send(
            self.process,
            shard.process,
            lambda: self._network.send(shard.process, self.process, answer),
        )
        return bool(await answered)

    def _hand_out(self, events: list[tuple[Key, TokenChunk | MantaError]]) -> None:
        for key, item in events:
            if (waiting := self._waiting.get(key)) is not None:
                waiting.put(item)

    # The engine's part, as `router_service.engine` has it

    def _command(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        if not self.is_in_step:
            self.is_in_step = True
            self.process.after(0.0, self._begin_step)

    def _arrive(self, sequence: EngineSequence) -> None:
        self._arriving[sequence.request.cache_salt] -= 1
        self.sequences[sequence.request.key] = sequence
        sequence.check_finished(self.scheduler.eos_token_ids, self.scheduler.max_model_len)
        if sequence.finish_reason is not None:
            self._tell([(sequence.request.key, _chunk(sequence, ()))])
            del self.sequences[sequence.request.key]
        else:
            self.scheduler.add(sequence)

    def _abort(self, key: Key) -> None:
        sequence = self.sequences.pop(key, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def _begin_step(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        now = self.process.clock()
        late = [sequence for sequence in self.sequences.values() if sequence.request.deadline.at < now]
        self._fail(late, DeadlineExceeded("the request's deadline passed"))
        self._batch = self.scheduler.schedule()
        if not self._batch:
            if self.sequences:
                self.process.after(10 * IDLE_S, self._begin_step)
            else:
                self.is_in_step = False
            return
        self._step += 1
        self._piece = 0
        num_tokens = sum(scheduled.num_tokens for scheduled in self._batch)
        number = min(self.costs.microbatches, num_tokens)
        self._sizes = [(num_tokens + part) // number for part in range(number)]
        self._go_on()

    def _go_on(self) -> None:
        """To the next piece of the step: a layer of one microbatch, which waits for that microbatch's layer before."""
        if self._piece >= len(self._sizes) and (before := self._piece - len(self._sizes)) in self._flights:
            self._waiting_for = list(self._flights[before])
            self._settle()
        elif self._piece < len(self._sizes) * self.costs.num_layers:
            num_tokens = self._sizes[self._piece % len(self._sizes)]
            seconds = (self.costs.layer_s + num_tokens * self.costs.token_s) * self.process.slowness
            self.process.after(seconds, self._dispatch, num_tokens)
        elif self._flights:
            self._piece += 1
            self._go_on()
        else:
            self._book()

    def _dispatch(self, num_tokens: int) -> None:
        """Send the rows of one layer to their groups."""
        deliveries = self.deliveries
        deliveries.look_at_table()
        now = self.process.clock()
        deadline = now + deliveries.timeout_s
        flight = self._flights[self._piece] = []
        for group, rows in self._routed(num_tokens):
            shares: list[tuple[str | None, int]] = [(None, rows)]
            if rows >= 2 * SPLIT_ROWS:
                shares = deliveries.loads.shares(self.routes.reachable(group), rows)
            for replica_id, share in shares:
                tag = (self.process.name, self._step, self._piece, group)
                delivery = Delivery(deliveries, group, share, Rows(tag, share), deadline, replica_id)
                flight.append(delivery)
                delivery.post(now)
        self._piece += 1
        self._go_on()

    def _routed(self, num_tokens: int) -> list[tuple[int, int]]:
        """How many rows each group gets: by chance for few rows, as many as its popularity says for many."""
        rows = num_tokens * self.costs.top_k
        groups = list(self.counts)
        if rows < 4 * len(groups):
            chosen = Counter(self._chance.choices(groups, self._popularity, k=rows))
            return sorted(chosen.items())
        return [(group, max(1, round(rows * self._popularity[group]))) for group in groups]

    # Waiting, as `Deliveries.settle` does

    def _settle(self) -> None:
        """Wait for what the deliveries can go on with."""
        live, until, _ = self.deliveries.awaited(self._waiting_for)
        self._looks_at_table = not live
        if until < self._timer_at or self._timer_at <= self.process.clock():
            self._timer_at = until
            self.process.at(until, self._time_comes, until)

    def _time_comes(self, at: float) -> None:
        if self._timer_at == at:
            self._timer_at = float("inf")
            if self._waiting_for:
                self._react()

    def _table_changed(self) -> None:
        if self._looks_at_table and self._waiting_for:
            self._wake()

    def _wake(self) -> None:
        """Something has come that the engine waits for, as soon as its thread has its turn."""
        if self._waiting_for and self._wakes_at != self.process.queue.now:
            self._wakes_at = self.process.queue.now
            self.process.after(0.0, self._woken)

    def _woken(self) -> None:
        self._wakes_at = None
        if self._waiting_for:
            self._react()

    def _react(self) -> None:
        now = self.process.clock()
        still = []
        for delivery in self._waiting_for:
            delivery.step(now)
            if not delivery.is_over:
                still.append(delivery)
                continue
            self._observer.delivered(self, delivery, now)
            if delivery.answer is None:
                self._fail_step(delivery)
                return
            self.counts[delivery.group].observe(now - delivery.deadline + self.deliveries.timeout_s)
        number = self._piece - len(self._sizes)
        flight = self._flights[number]
        if not still:
            still = [one for one in flight if one.answer is not None and not one.answer.is_finite]
            still = [one for one in still if one.reject()]
        self._waiting_for = still
        if still:
            self._settle()
            return
        self._observer.combined(flight)
        for delivery in flight:
            delivery.close()
        if any(one.answer is not None and not one.answer.is_finite for one in flight):
            self._end_step(Unavailable("the model's output is not finite"))
            return
        del self._flights[number]
        self._go_on()

    def _fail_step(self, delivery: Delivery[Rows, LaneAttempt]) -> None:
        error = delivery.error or ExpertUnavailable(
            f"expert group {delivery.group} did not answer ({delivery.reason})", group=delivery.group
        )
        self._end_step(error if isinstance(error, MantaError) else Unavailable(str(error)))

    def _end_step(self, error: MantaError) -> None:
        for delivery in self.under_way:
            delivery.close()
        self._flights.clear()
        self._waiting_for = []
        here = [one.sequence for one in self._batch if self.sequences.get(one.sequence.request.key) is one.sequence]
        self._fail(here, error)
        self.scheduler.check(self.sequences.values())
        self._begin_step()

    def _book(self) -> None:
        """Sample, and tell everybody."""
        batch = self._batch
        sampled = [one.sequence for one in batch if one.samples]
        tokens = [token_of(one.request, one.num_output_tokens, one.token_ids[-1]) for one in sampled]
        failures = self.scheduler.update(batch, tokens)
        assert not failures, failures
        events: list[tuple[Key, TokenChunk | MantaError]] = []
        for sequence in sampled:
            key = sequence.request.key
            events.append((key, _chunk(sequence, (sequence.token_ids[-1],))))
            if sequence.finish_reason is not None:
                del self.sequences[key]
        self._observer.stepped(self)
        self._tell(events)
        self._begin_step()

    def _fail(self, sequences: list[EngineSequence], error: MantaError) -> None:
        for sequence in sequences:
            self._abort(sequence.request.key)
        self._tell([(sequence.request.key, error) for sequence in sequences])

    def _tell(self, events: list[tuple[Key, TokenChunk | MantaError]]) -> None:
        if events:
            self.process.loop.call_soon_threadsafe(self._hand_out, events)

    def posted(self, attempt: LaneAttempt) -> None:
        self._observer.posted(self, attempt)

    def accepted(self, attempt: LaneAttempt) -> None:
        self._observer.accepted(self, attempt)

    def failed(self, attempt: LaneAttempt) -> None:
        self._observer.failed(self, attempt)


def received(request: Request, sent_from: Process, here: Process) -> Request:
    """As it is unpickled: its deadline by the clock of this process."""
    if request.deadline.at == float("inf") or sent_from.clock_offset_s == here.clock_offset_s:
        return request
    remaining_s = request.deadline.at - sent_from.clock()
    return replace(request, deadline=Deadline(here.clock() + remaining_s))


def _chunk(sequence: EngineSequence, token_ids: tuple[int, ...]) -> TokenChunk:
    return TokenChunk(
        *sequence.request.key,
        first_position=sequence.num_output_tokens - len(token_ids),
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
    )
