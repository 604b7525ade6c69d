"""Lanes under simulated time: what `LaneRoutes` chooses from, and the carrier that a delivery posts with.

As `experts_service.carriers` has them, without bytes: an answer is read when it comes, whoever waits for it, and one
that nobody waits for is owed until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from cluster.simulation.shards import Frame, Shard
from cluster.simulation.world.events import Event
from cluster.simulation.world.network import Connection, Network
from cluster.simulation.world.processes import Process
from experts_service.carriers.routes import LaneRoutes
from experts_service.delivery.delivery import ANSWERED, CANCELLED, POSTED, Attempt
from experts_service.routing_table import Deployment, Replica, RoutingTable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0  # between two dials of one replica, as `carriers.links` has them
DIAL_TIMEOUT_S = 7.0  # to be told where a shard listens, and to shake hands
ASK_S = 0.003  # an actor's call
MOST_DIALS = 60  # that are remembered of one replica


class Rows(NamedTuple):
    """What one delivery carries."""

    tag: tuple[str, int, int, int]  # coordinator, step, layer, group
    number: int


class LaneAttempt(Attempt):
    """What a shard was asked, and what its answer was computed from."""

    def __init__(self, replica: Replica, epoch: int, rows: Rows, spare: bool, carrier: LaneCarrier) -> None:
        super().__init__(replica, epoch)
        self.rows = rows
        self.is_spare = spare
        self.carrier = carrier
        self.lane: Lane | None = None
        self.request_id = 0
        self.is_finite = True
        self.tag: tuple[str, int, int, int] | None = None  # of the answer

    def accept(self) -> None:
        self.carrier.owner.accepted(self)

    def fail(self, reason: str) -> None:
        super().fail(reason)
        self.carrier.owner.failed(self)


class Lane:
    """A connection to one shard, as the coordinator sees it."""

    thread_id = 0

    def __init__(self, connection: Connection, coordinator: Process, shard: Shard, wake: Callable[[], None]) -> None:
        self.connection = connection
        self.shard = shard
        self.lost = False
        self.outstanding: dict[int, LaneAttempt] = {}
        self.forgotten: set[int] = set()
        self._coordinator = coordinator
        self._wake = wake
        connection.on_close[coordinator] = lambda: self.give_up("it closed the connection")

    def owed(self) -> int:
        return len(self.outstanding) + len(self.forgotten)

    def post(self, attempt: LaneAttempt, remaining_s: float) -> None:
        self.outstanding[attempt.request_id] = attempt
        attempt.lane = self
        rows, left_s = attempt.rows, max(0.0, remaining_s)
        frame = Frame(self.connection, self.hear, attempt.request_id, rows.tag, rows.number, left_s)
        self.connection.send(self._coordinator, self.shard.receive, frame)

    def hear(self, request_id: int, what: str, tag: tuple[str, int, int, int]) -> None:
        """The shard's word on one attempt has come."""
        attempt = self.outstanding.pop(request_id, None)
        if attempt is None:
            self.forgotten.discard(request_id)
            return
        if what in ("answers", "is not finite"):
            attempt.tag, attempt.is_finite, attempt.state = tag, what == "answers", ANSWERED
        else:
            attempt.fail(what)
            attempt.raised = what == "raises"
        self._wake()

    def forget(self, attempt: LaneAttempt) -> None:
        if self.outstanding.pop(attempt.request_id, None) is not None:
            self.forgotten.add(attempt.request_id)

    def give_up(self, reason: str) -> None:
        for attempt in self.outstanding.values():
            if attempt.state is POSTED:
                attempt.fail(reason)
        self.close()
        self._wake()

    def close(self) -> None:
        self.lost = True
        self.forgotten.clear()
        self.outstanding.clear()
        self.connection.close(self._coordinator)


class Lanes:
    """The `Connections` of one coordinator; a dial takes simulated time."""

    def __init__(
        self,
        process: Process,
        table: RoutingTable,
        network: Network,
        shard_of: Callable[[Replica], Shard | None],
        wake: Callable[[], None],
    ) -> None:
        """`shard_of`: the present incarnation, if it lives and has loaded."""
        self._process = process
        self._table = table
        self._network = network
        self._shard_of = shard_of
        self._wake = wake
        self._lanes: dict[str, Lane] = {}
        self._dialled: dict[str, Lane] = {}
        self._dialling: dict[str, _Dial] = {}
        self.dials: dict[str, deque[float]] = {}  # when each replica was last dialled

    def get(self, replica_id: str) -> Lane | None:
        lane = self._lanes.get(replica_id)
        return None if lane is None or lane.lost else lane

    def dial(self, deployment: Deployment, replica: Replica) -> None:
        replica_id = replica.replica_id
        if replica_id in self._dialled or self.get(replica_id):
            return
        if (under_way := self._dialling.get(replica_id)) is not None:
            if replica.epoch > under_way.replica.epoch:
                under_way.replica = replica
                self.hurry(replica_id)
            return
        dial = self._dialling[replica_id] = _Dial(deployment, replica)
        self._begin(dial)

    def connect_at_once(self, replica: Replica, shard: Shard) -> None:
        """Of a fleet that begins with everything up."""
        connection = self._network.connect(self._process, shard.process)
        self._lanes[replica.replica_id] = Lane(connection, self._process, shard, self._wake)

    def refusal(self, replica_id: str) -> str:
        dial = self._dialling.get(replica_id)
        return "" if dial is None else dial.reason

    def hurry(self, replica_id: str) -> None:
        dial = self._dialling.get(replica_id)
        if dial is not None and dial.pause is not None and dial.pause.is_waiting:
            dial.pause.cancel()
            self._begin(dial)

    def wait(self, replicas: Iterable[Replica], timeout_s: float) -> str:
        """Nobody waits here: a delivery without a connection goes on when the table says that there is one."""
        raise NotImplementedError

    def take(self) -> None:
        for replica_id, lane in self._dialled.items():
            if before := self._lanes.get(replica_id):
                before.close()
            self._lanes[replica_id] = lane
        self._dialled.clear()

    def keep_only(self, known: set[str]) -> bool:
        departed = [replica_id for replica_id in self._lanes if replica_id not in known]
        owing = [replica_id for replica_id in departed if self._lanes[replica_id].outstanding]
        for replica_id in departed:
            if replica_id not in owing:
                self._lanes.pop(replica_id).close()
        return not owing

    def close(self) -> None:
        for lane in [*self._lanes.values(), *self._dialled.values()]:
            lane.close()

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def all(self) -> Iterable[tuple[str, Lane]]:
        return self._lanes.items()

    def _begin(self, dial: _Dial) -> None:
        """Ask the shard's actor where it listens, connect and shake hands: three times there and back."""
        self.dials.setdefault(dial.replica.replica_id, deque(maxlen=MOST_DIALS)).append(self._process.queue.now)
        dial.number += 1
        dial.timeout = self._process.after(
            DIAL_TIMEOUT_S, self._refused, dial, dial.number, "it did not answer in time"
        )
        shard = self._shard_of(dial.replica)
        if shard is None:
            self._process.after(ASK_S, self._refused, dial, dial.number, "no actor of that name answers")
            return
        self._network.send(self._process, shard.process, self._asked, dial, dial.number, shard)

    def _asked(self, dial: _Dial, number: int, shard: Shard) -> None:
        """At the shard."""
        self._network.send(shard.process, self._process, self._answered, dial, number, shard)

    def _answered(self, dial: _Dial, number: int, shard: Shard) -> None:
        if number != dial.number or self._dialling.get(dial.replica.replica_id) is not dial:
            return  # too late
        self._end(dial)
        if not shard.process.is_alive:
            self._refused(dial, number, "the connection was refused")
            return
        replica_id = dial.replica.replica_id
        del self._dialling[replica_id]
        connection = self._network.connect(self._process, shard.process)
        self._dialled[replica_id] = Lane(connection, self._process, shard, self._wake)
        self._table.renew(dial.deployment, replica_id)

    def _refused(self, dial: _Dial, number: int, reason: str) -> None:
        replica_id = dial.replica.replica_id
        if number != dial.number or self._dialling.get(replica_id) is not dial:
            return
        self._end(dial)
        dial.reason = reason
        if all(one.replica_id != replica_id for one in self._table.replicas(dial.deployment)):
            del self._dialling[replica_id]
            return
        dial.pause = self._process.after(dial.pause_s, self._begin, dial)
        dial.pause_s = min(2 * dial.pause_s, LONGEST_PAUSE_S)

    def _end(self, dial: _Dial) -> None:
        if dial.timeout is not None:
            dial.timeout.cancel()


class _Dial:
    """Attempts to reach one replica."""

    def __init__(self, deployment: Deployment, replica: Replica) -> None:
        self.deployment = deployment
        self.replica = replica
        self.pause_s = FIRST_PAUSE_S
        self.number = 0
        self.reason = ""
        self.pause: Event | None = None
        self.timeout: Event | None = None


class Owner(Protocol):
    """Is told what becomes of attempts."""

    def posted(self, attempt: LaneAttempt) -> None:
        """It is on its way, or has failed at once."""

    def accepted(self, attempt: LaneAttempt) -> None:
        """Its answer counts."""

    def failed(self, attempt: LaneAttempt) -> None:
        """None that can be taken will come."""


class LaneCarrier:
    """Posts over the lanes that the routes have; the coordinator is woken when something comes."""

    def __init__(
        self,
        routes: LaneRoutes[Lane],
        owner: Owner,
    ) -> None:
        self._routes = routes
        self.owner = owner
        self._next_id = 0

    def post(
        self,
        rows: Rows,
        replica: Replica,
        epoch: int,
        number: int,  # noqa: ARG002  # a request id is enough to know an answer by
        remaining_s: float,
        *,
        spare: bool,
    ) -> LaneAttempt:
        self._next_id += 1
        attempt = LaneAttempt(replica, epoch, rows, spare, self)
        attempt.request_id = self._next_id
        lane = self._routes.link(replica)
        if lane is None:
            attempt.fail("its connection was lost")
        else:
            lane.post(attempt, remaining_s)
        self.owner.posted(attempt)
        return attempt

    def poll(self, attempts: Sequence[LaneAttempt], until: float, soon: float, *, each: bool) -> None:
        """Nobody polls: a lane wakes its coordinator."""
        raise NotImplementedError

    def cancel(self, attempt: LaneAttempt, *, silent: bool = False) -> None:
        lane = attempt.lane
        if lane is not None and silent:
            lane.give_up("it is silent")
        elif lane is not None:
            lane.forget(attempt)
        attempt.state = CANCELLED
