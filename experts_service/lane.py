"""Transport `lane`: a connection per replica, a frame per group. Chooses whom to ask, and sends.

    send    one sendmsg per group, to all of them before anything is read; returns without waiting
    wait    of the flight that it returns: `lane_flight.py`

Where a group has several replicas, many rows are split over them. Where shards share few cores with this process, those
that are asked at the same time are moved to different ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cluster.metrics import DispatchCounts
from experts_service.core_balance import CoreBalance
from experts_service.cost import cost
from experts_service.frame import MAX_DEADLINE_MS, RowsFormat, answer_head
from experts_service.lane_dialer import Dialer
from experts_service.lane_flight import LONGEST_PAUSE_S, AskedGroup, Asker, LaneFlight
from experts_service.lane_link import Ask, LinkLost
from experts_service.lane_links import LaneLinks
from experts_service.replica_load import OVERDUE_S, ReplicaLoads
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.transport import Flight, GroupRows

SPLIT_ROWS = 64  # fewest rows of a group that are worth a replica of their own: each reads the weights again


class LaneTransport(Asker):
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
        self.timeout_s = timeout_s
        self.latency = latency or {group: DispatchCounts() for group in self.deployments}
        self._links = LaneLinks(dialer, table, timeout_s)
        self._cores = cores
        self._threads: dict[int, int] = {}  # group → its shard's thread, while cores have to be shared; at `_epoch`
        self._routes: dict[int, tuple[Replica, ...]] = {}  # group → replicas to use, at `_epoch`
        self._unreached: frozenset[int] = frozenset()  # groups of whose replicas none is connected, at `_epoch`
        self._forms: dict[int, RowsFormat] = {}  # number of experts → format
        self._epoch = -1
        self._replicated = False  # whether any group has several replicas
        self._next_id = 0
        self.answers_soon = False
        self.loads = ReplicaLoads()

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        now = time.monotonic()
        flight = LaneFlight(self, layer, rows, now)
        if not parts:
            return flight
        row_bytes = flight.row_bytes
        memory = flight.memory(parts[0].answers)  # [N, D] as bytes
        host = _on_host(rows).view(torch.uint8).numpy()  # [T, D · item]
        if self._epoch != self.table.epoch:
            self._look_at_table()
        if self._replicated and any(len(part.row_indices) >= 2 * SPLIT_ROWS for part in parts):
            parts = [piece for part in parts for piece in split(part, len(self._routes[part.group]))]
        if self._cores is not None and all(part.group in self._threads for part in parts):
            self._cores.spread([(self._threads[part.group], cost(part.counts)) for part in parts])
        try:
            for part in parts:
                count = len(part.row_indices)
                data = host if count == 1 == len(host) else host.take(part.row_indices, axis=0)
                self._next_id += 1
                start = part.start * row_bytes
                ask = Ask(self._next_id, memory[start : start + count * row_bytes])
                group = AskedGroup(part, data.data.cast("B"), ask, now)
                flight.groups.append(group)
                self.attempt(flight, group, self.timeout_s)
        except BaseException:
            flight.close()
            raise
        return flight

    def attempt(self, flight: LaneFlight, group: AskedGroup, remaining_s: float) -> None:
        if self._epoch != self.table.epoch:
            self._look_at_table()
        ask, reason = group.ask, ""
        if group.part.group in self._unreached:
            reason = self._wait_for_link(group.part.group, remaining_s)
        replicas = self._routes[group.part.group]
        if not replicas:
            ask.failed = group.reason
            return
        replica = replicas[0]
        if reason:
            group.replica_id, group.epoch, ask.failed = replica.replica_id, self._epoch, reason
            return
        group.is_timed = len(replicas) > 1
        group.hedge_at = group.sent_at + OVERDUE_S  # another may be connected by then
        if group.is_timed:
            num_rows = len(group.part.row_indices)
            replica = self.loads.choose(replicas, self._owed)
            group.hedge_at = group.sent_at + self.loads.patience_s(group.part.group, num_rows)
        group.replica_id, group.epoch = replica.replica_id, self._epoch
        self._ask(flight, group, ask, replica, remaining_s)

    def hedge(self, flight: LaneFlight, group: AskedGroup, remaining_s: float, now: float) -> None:
        others = self.others(group)
        if not others:
            group.hedge_at = now + LONGEST_PAUSE_S
            return
        group.hedge_at, group.is_timed = 0.0, True
        replica = min(others, key=lambda other: self._owed(other.replica_id))
        self._next_id += 1
        group.hedge = Ask(self._next_id, memoryview(bytearray(len(group.ask.memory))))
        group.hedge_id, group.hedged_at = replica.replica_id, now
        self.loads.hedged()
        self.latency[group.part.group].hedges += 1
        self._ask(flight, group, group.hedge, replica, remaining_s)

    def answered(self, group: AskedGroup, now: float) -> None:
        part, hedge = group.part, group.hedge
        loads, num_rows = self.loads, len(part.row_indices)
        if hedge is None:
            loads.answered(group.replica_id, part.group, num_rows, now - group.sent_at)
            return
        loads.answered(group.replica_id, part.group, num_rows, now - group.sent_at, beaten=hedge.done)
        if hedge.done:
            loads.answered(group.hedge_id, part.group, num_rows, now - group.hedged_at)
        elif hedge.link is not None:
            hedge.link.forget(hedge)
        group.hedge = None

    def _ask(self, flight: LaneFlight, group: AskedGroup, ask: Ask, replica: Replica, remaining_s: float) -> None:
        """Send the rows to one replica. Leaves the reason in `ask.failed` when that did not even start."""
        part = group.part
        group.attempt += 1
        form = self._forms.get(len(part.counts)) or self._form(len(part.counts))
        head = form.pack(
            flight.dtype, ask.request_id, self._epoch, flight.layer, group.attempt, len(part.row_indices),
            flight.hidden, min(MAX_DEADLINE_MS, int(remaining_s * 1000)), part.counts,
        )  # fmt: skip
        ask.failed, ask.expected = "", answer_head(head)
        link = self._links.get(replica.replica_id)
        if link is None:
            self._epoch = -1  # whatever the table says, the routes are out of date
            ask.failed = "its connection was lost"
            return
        try:
            link.send(ask, head, group.rows)
        except LinkLost as lost:
            ask.failed = str(lost)

    def _owed(self, replica_id: str) -> int:
        """Dispatches that a replica has not answered, also those that nobody waits for any more."""
        link = self._links.get(replica_id)
        if link is None:
            return 0
        if link.forgotten:
            with suppress(LinkLost):
                link.skip_forgotten()
        return len(link.outstanding) + len(link.forgotten)

    def reaches(self, group: int) -> bool:
        """Whether a replica of the group has a lane to us; where none has, each is dialled first.

        Where all are suspected, or none is known, this says yes: a dispatch then waits for them, by whatever way.
        """
        if self._epoch != self.table.epoch:
            self._look_at_table()
        if group not in self._unreached or all(r.suspected for r in self._routes[group]):
            return True
        return not self._wait_for_link(group, self.timeout_s)

    def _wait_for_link(self, group: int, timeout_s: float) -> str:
        """Have a group without any connection dialled now; why that failed, or nothing."""
        reason = self._links.wait(self._routes[group], timeout_s)
        self._look_at_table()
        return reason

    def suspect(self, group: AskedGroup, reason: str) -> None:
        group.reason = reason
        self.table.suspect(self.deployments[group.part.group], group.replica_id, group.epoch)

    def give_up(self, group: AskedGroup, reason: str) -> None:
        link = self._links.get(group.replica_id)
        if link is not None:
            link.give_up(reason)

    def close(self) -> None:
        self._links.close()

    def others(self, group: AskedGroup) -> list[Replica]:
        if self._epoch != self.table.epoch:
            self._look_at_table()
        replicas = self._routes[group.part.group]
        return [
            r
            for r in replicas
            if r.replica_id != group.replica_id and not r.suspected and self._links.get(r.replica_id) is not None
        ]

    def _form(self, num_experts: int) -> RowsFormat:
        form = self._forms[num_experts] = RowsFormat(num_experts)
        return form

    def _look_at_table(self) -> None:
        """Choose among trusted replicas, or suspected ones where there is no other; let go of those that left."""
        epoch = self.table.epoch
        links = self._links
        links.take()
        known: set[str] = set()
        unreached = set()
        for group, deployment in self.deployments.items():
            replicas = self.table.replicas(deployment)
            for replica in replicas:
                known.add(replica.replica_id)
                if links.get(replica.replica_id) is None:
                    links.dial(deployment, replica)
            trusted = tuple(r for r in replicas if not r.suspected) or replicas
            connected = tuple(r for r in trusted if links.get(r.replica_id) is not None)
            self._routes[group] = connected or trusted
            if not connected:
                unreached.add(group)
        self._unreached = frozenset(unreached)
        self._replicated = any(len(replicas) > 1 for replicas in self._routes.values())
        self._threads = self._threads_to_spread()
        self.loads.forget(known)
        links.keep_only(known)
        self._epoch = epoch

    def _threads_to_spread(self) -> dict[int, int]:
        """By group, the thread of its one replica; none where the kernel finds a core for each by itself."""
        if self._cores is None:
            return {}
        links = [(group, self._links.get(r.replica_id)) for group, replicas in self._routes.items() for r in replicas]
        threads = {group: link.thread_id for group, link in links if link is not None and link.thread_id}
        if not self._replicated and self._cores.is_needed(len(threads)):
            return threads
        self._cores.release()
        return {}


def split(part: GroupRows, num_replicas: int) -> list[GroupRows]:
    """The same rows in pieces of about equal size, at least SPLIT_ROWS each, and at most one for each replica."""
    num_rows = len(part.row_indices)
    pieces = min(num_replicas, num_rows // SPLIT_ROWS)
    if pieces < 2:
        return [part]
    ends = [0, *accumulate(part.counts)]  # where each expert's rows end
    cuts = [num_rows * i // pieces for i in range(pieces + 1)]
    return [
        GroupRows(
            part.group,
            part.row_indices[start:end],
            tuple(max(0, min(end, last) - max(start, first)) for first, last in pairwise(ends)),
            part.answers,
            part.start + start,
        )
        for start, end in pairwise(cuts)
    ]


def _on_host(rows: Tensor) -> Tensor:
    """The rows in contiguous host memory; those of a GPU through pinned memory."""
    if rows.device.type == "cpu":
        return rows.contiguous()
    staged = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    return staged.copy_(rows)
