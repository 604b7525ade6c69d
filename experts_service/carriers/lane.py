"""Transport `lane`: a connection per replica, a frame per part of a group. Sends and receives; whom to ask is others'.

    post    rows into slots of memory that the shard maps as well, and one send of their head; where there is none, or
            no room in it, one sendmsg of both. What the socket has no room for is sent while answers are waited for
    poll    one recvmsg_into per answer, in turn, straight into the combine buffer; the kernel holds the others'. An
            answer in a slot is copied there when its head has come

Where rows wait to be sent, where an attempt may soon be hedged, and where an answer is late, all connections are polled
at once instead. The usual dispatch over memory makes none of this: `fast_path` posts it and takes its answers, and
hands over what turns out to be unusual.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from socket import MSG_DONTWAIT

from torch import Tensor

from cluster.telemetry.metrics import DispatchCounts
from experts_service.carriers.core_balance import CoreBalance
from experts_service.carriers.dialer import Dialer
from experts_service.carriers.fast_path import FastPath
from experts_service.carriers.lane_rows import LaneBatch, LaneRows
from experts_service.carriers.link import NOTHING, WAIT_S, LaneAttempt, Link, LinkLost
from experts_service.carriers.links import LaneLinks
from experts_service.carriers.routes import LaneRoutes
from experts_service.delivery.delivery import CANCELLED, POSTED, Deliveries
from experts_service.delivery.flight import RemoteFlight, pieces, split
from experts_service.device import on_host
from experts_service.kernels import finite
from experts_service.kernels.cost import cost
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.transport import Flight, GroupRows
from experts_service.wire.frame import MAX_DEADLINE_MS, MAX_PAYLOAD_BYTES, RowsFormat, answer_head


class LaneCarrier:
    """Frames over the connections that `routes` has."""

    def __init__(self, routes: LaneRoutes[Link], request_ids: Iterator[int]) -> None:
        self._routes = routes
        self._forms: dict[int, RowsFormat] = {}  # number of experts → format
        self._request_ids = request_ids

    def post(
        self, rows: LaneRows, replica: Replica, epoch: int, number: int, remaining_s: float, *, spare: bool
    ) -> LaneAttempt:
        batch, part = rows
        place = batch.place(part)
        memory = memoryview(bytearray(len(place))) if spare else place
        attempt = LaneAttempt(replica, epoch, next(self._request_ids), memory, place if spare else None)
        link = self._routes.link(replica)
        if link is None:
            attempt.fail("its connection was lost")
            return attempt
        num_experts = len(part.counts)
        form = self._forms.get(num_experts)
        if form is None:
            form = self._forms[num_experts] = RowsFormat(num_experts)
        request_id, shared = attempt.request_id, link.memory
        slot = 0 if shared is None else shared.write(request_id, batch.rows, batch.row_bytes, part.row_indices)
        try:
            head = form.pack(
                batch.dtype, request_id, epoch, batch.layer, number, len(part.row_indices), batch.hidden,
                max(0, min(MAX_DEADLINE_MS, int(remaining_s * 1000))), part.counts, slot,
            )  # fmt: skip
        except BaseException:
            if shared is not None:
                shared.slots.give_back(request_id)  # nobody was told of them
            raise
        attempt.expected = answer_head(head)
        try:
            if slot:
                attempt.slot, attempt.follows = slot, NOTHING
                link.send(attempt, head)
            else:
                link.send(attempt, head, batch.gather(part))
        except LinkLost as lost:
            attempt.fail(str(lost))
        return attempt

    def poll(self, attempts: Sequence[LaneAttempt], until: float, soon: float, *, each: bool) -> None:
        if (len(attempts) == 1 or not each) and until - time.monotonic() >= WAIT_S:
            for attempt in attempts:
                if attempt.link is not None and attempt.link.unsent:
                    break
            else:
                first = attempts[0]
                assert first.link is not None
                try:
                    while first.state is POSTED and time.monotonic() < until:  # it may come a few bytes at a time
                        first.link.wait(first, soon)
                except (BlockingIOError, LinkLost):
                    pass
                if first.state is not POSTED:
                    return
        poll = select.poll()
        by_descriptor: dict[int, list[LaneAttempt]] = {}
        for attempt in attempts:
            if (link := attempt.link) is not None and attempt.state is POSTED:
                by_descriptor.setdefault(link.channel.fileno(), []).append(attempt)
                poll.register(link.channel, select.POLLIN | (select.POLLOUT if link.unsent else 0))
        timeout_s = max(0.0, until - time.monotonic())
        for descriptor, _ in poll.poll(math.ceil(timeout_s * 1000)):
            for attempt in by_descriptor[descriptor]:
                _read(attempt)

    def cancel(self, attempt: LaneAttempt, *, silent: bool = False) -> None:
        link = attempt.link
        if link is not None and silent:
            link.give_up("it is silent")  # it is dialled again, and used when that succeeds
        elif link is not None:
            link.forget(attempt)
        attempt.state = CANCELLED


class LaneTransport:
    """Sends rows over connections to the replicas that the routing table names."""

    def __init__(
        self,
        deployments: Mapping[int, Deployment],
        table: RoutingTable,
        dialer: Dialer,
        *,
        timeout_s: float,
        latency: Mapping[int, DispatchCounts] | None = None,
        cores: CoreBalance | None = None,
    ) -> None:
        """`cores`: spreads shards over those of this machine, where they share it."""
        self.deployments = dict(deployments)  # group → its deployment
        self.table = table
        self.latency = latency or {group: DispatchCounts() for group in self.deployments}
        links = LaneLinks(dialer, table, timeout_s)
        self.routes = LaneRoutes(self.deployments, table, links, timeout_s, cores)
        request_ids = count(1)
        self.deliveries: Deliveries[LaneRows, LaneAttempt] = Deliveries(
            LaneCarrier(self.routes, request_ids), self.routes, table, self.deployments, timeout_s, self.latency
        )
        self._cores = cores
        self._fast_path = FastPath(self.deliveries, self.routes, request_ids, None if cores is None else self._spread)
        finite.load()  # no answer waits for it

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        fast = self._fast_path.send(layer, rows, parts)
        if fast is None and not rows.is_cpu:
            rows = on_host(rows)
            fast = self._fast_path.send(layer, rows, parts)
        if fast is not None:
            return fast
        flight = RemoteFlight(self.deliveries, layer, rows, parts)
        if flight.received is None:
            return flight
        batch = LaneBatch.of(layer, rows, flight.received)
        shared_out = pieces(parts, self.routes, self.deliveries.loads)
        parts = [frame for part in shared_out for frame in _frames(part, batch.row_bytes)]
        self._spread(parts)
        connected = self.routes.all_connected()
        try:
            for part in parts:
                if not connected:
                    self.routes.connect(part.group)
                flight.post(part, (batch, part))
        except BaseException:
            flight.close()
            raise
        return flight

    def _spread(self, parts: Sequence[GroupRows]) -> None:
        """Have shards that are about to be asked run on different cores."""
        if self._cores is not None and (threads := self.routes.threads([part.group for part in parts])):
            self._cores.spread([(thread, cost(part.counts)) for thread, part in zip(threads, parts, strict=True)])

    @property
    def takes_device_rows(self) -> bool:
        return self._fast_path.takes_device_rows

    def reaches(self, group: int) -> bool:
        """Whether a replica of the group has a lane to us. Waits where none has been dialled yet."""
        return self.routes.reaches(group)

    def close(self) -> None:
        self.routes.close()


def _frames(part: GroupRows, row_bytes: int) -> list[GroupRows]:
    """The same rows in pieces that frames may hold: one, as a rule."""
    rows, most = len(part.row_indices), MAX_PAYLOAD_BYTES // row_bytes
    return split(part, [(part.replica_id, min(most, rows - start)) for start in range(0, rows, most)])


def _read(attempt: LaneAttempt) -> None:
    """Write and read what its connection is ready for."""
    link = attempt.link
    if link is None or attempt.state is not POSTED:
        return
    with suppress(BlockingIOError, LinkLost):
        link.flush()
        while attempt.state is POSTED:
            link.receive(attempt, MSG_DONTWAIT)
