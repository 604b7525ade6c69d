"""Which replicas have a lane to this coordinator. Knows the routing table and connections; knows no rows.

What is worked out holds for one epoch of the table: whoever fails, comes back, leaves or is connected raises it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from experts_service.carriers.core_balance import CoreBalance
from experts_service.routing_table import Deployment, Replica, RoutingTable


class Connection(Protocol):
    """One to a replica."""

    @property
    def lost(self) -> bool: ...

    @property
    def thread_id(self) -> int:
        """Of the one thread that computes at its other end, on this machine; 0: it is not here."""

    def owed(self) -> int:
        """Attempts that the shard has not answered, also those that nobody waits for any more."""


L = TypeVar("L", bound=Connection)
L_co = TypeVar("L_co", bound=Connection, covariant=True)


class Connections(Protocol[L_co]):
    """One at most for each replica; `links.LaneLinks` has those over sockets."""

    def get(self, replica_id: str) -> L_co | None:
        """One that is not known to be lost."""

    def dial(self, deployment: Deployment, replica: Replica) -> None:
        """Have a connection made, unless there is one. Success renews the replica in the table."""

    def refusal(self, replica_id: str) -> str:
        """Why its last dial failed; nothing while none has."""

    def hurry(self, replica_id: str) -> None:
        """Cut the pause before its next dial short."""

    def wait(self, replicas: Iterable[Replica], timeout_s: float) -> str:
        """Return once one of these is connected, or each has refused once more; why the last one did, or nothing."""

    def take(self) -> None:
        """Have `get` know what was dialled."""

    def keep_only(self, known: set[str]) -> bool:
        """Let go of replicas that left and owe no answer that somebody waits for. Whether none is left of them."""

    def close(self) -> None:
        """Idempotent."""


class LaneRoutes(Generic[L]):
    """The connected replicas of every group. Used by one thread, the engine's."""

    def __init__(
        self,
        deployments: Mapping[int, Deployment],
        table: RoutingTable,
        links: Connections[L],
        timeout_s: float,
        cores: CoreBalance | None,
    ) -> None:
        self._deployments = deployments  # group → its deployment
        self._table = table
        self._links = links
        self._timeout_s = timeout_s
        self._cores = cores
        self._epoch = -1
        self._wanted: dict[int, tuple[Replica, ...]] = {}  # group → trusted replicas, or all where none is trusted
        self._reachable: dict[int, tuple[Replica, ...]] = {}  # those of them that are connected
        self._all_connected = False
        self._only: dict[int, tuple[Replica, L]] = {}
        self._known: set[str] = set()  # ids of all replicas
        self._departing = False  # whether there is a connection to another
        self._present: dict[str, L] = {}  # by replica id
        self._seen: dict[int, tuple[tuple[Replica, ...], list[L] | None]] = {}  # as the table had it; if all connected
        self._threads: dict[int, int] = {}  # group → its shard's thread, while cores have to be shared

    def reachable(self, group: int) -> tuple[Replica, ...]:
        if self._departing or self._epoch != self._table.epoch:
            self._look()
        return self._reachable[group]

    def all_connected(self) -> bool:
        """Whether every group has a replica that is connected."""
        return self._epoch == self._table.epoch and self._all_connected

    def only(self) -> Mapping[int, tuple[Replica, L]]:
        """By group the one replica that can be asked, where there is one. What a suspected one answers is news."""
        if self._departing or self._epoch != self._table.epoch:
            self._look()
        return self._only

    def connect(self, group: int) -> None:
        """Return once a replica of the group is connected, or each that was never dialled before has refused."""
        if self.reachable(group):
            return
        links = self._links
        if fresh := [replica for replica in self._wanted[group] if not links.refusal(replica.replica_id)]:
            links.wait(fresh, self._timeout_s)
            self._look_at_table()

    def refusal(self, group: int) -> tuple[Replica | None, str]:
        self.reachable(group)
        for replica in self._wanted[group]:
            self._links.hurry(replica.replica_id)
            if reason := self._links.refusal(replica.replica_id):
                return replica, reason
        return None, "it is not connected yet" if self._wanted[group] else ""

    def owed(self, replica_id: str) -> int:
        link = self._links.get(replica_id)
        return 0 if link is None else link.owed()

    def link(self, replica: Replica) -> L | None:
        """The connection to a replica; None when it is lost, which changes what is reachable."""
        link = self._present.get(replica.replica_id)
        if link is None or link.lost:
            self._epoch = -1  # whatever the table says
            return None
        return link

    def reaches(self, group: int) -> bool:
        """Whether a replica of the group has a lane to us; where none has, each is dialled first.

        Where all are suspected, or none is known, this says yes: a dispatch then waits for them, by whatever way.
        """
        if self.reachable(group) or all(replica.suspected for replica in self._wanted[group]):
            return True
        reason = self._links.wait(self._wanted[group], self._timeout_s)
        self._look_at_table()
        return not reason

    def threads(self, groups: list[int]) -> list[int]:
        """The threads of the shards of these groups, where they have to share cores with us; else nothing."""
        if self._epoch != self._table.epoch:
            self._look_at_table()
        threads = [self._threads[group] for group in groups if group in self._threads]
        return threads if len(threads) == len(groups) else []

    def close(self) -> None:
        """Idempotent."""
        self._links.close()

    def _look(self) -> None:
        if self._epoch != self._table.epoch:
            self._look_at_table()
        else:
            self._departing = not self._links.keep_only(self._known)

    def _look_at_table(self) -> None:
        """Dial those without a connection; let go of those that left. A group stays as it is while nothing is new."""
        epoch, links, known, present = self._table.epoch, self._links, self._known, self._present
        links.take()
        for group, deployment in self._deployments.items():
            replicas = self._table.replicas(deployment)
            before, connected = self._seen.get(group, ((), None))
            if replicas is before and connected and not any(link.lost for link in connected):
                continue
            for replica in before:
                known.discard(replica.replica_id)
                present.pop(replica.replica_id, None)
            for replica in replicas:
                known.add(replica.replica_id)
                if (link := links.get(replica.replica_id)) is None:
                    links.dial(deployment, replica)
                else:
                    present[replica.replica_id] = link
            here = [present[replica.replica_id] for replica in replicas if replica.replica_id in present]
            self._seen[group] = replicas, here if len(here) == len(replicas) else None
            self._wanted[group] = tuple(r for r in replicas if not r.suspected) or replicas
            self._reachable[group] = tuple(r for r in self._wanted[group] if r.replica_id in present)
        self._all_connected = all(self._reachable.values())
        only = ((group, replicas[0]) for group, replicas in self._reachable.items() if len(replicas) == 1)
        self._only = {group: (one, present[one.replica_id]) for group, one in only if not one.suspected}
        self._departing = not links.keep_only(known)
        self._threads = self._threads_to_spread()
        self._epoch = epoch

    def _threads_to_spread(self) -> dict[int, int]:
        """By group, the thread of its one replica; none where the kernel finds a core for each by itself."""
        if self._cores is None:
            return {}
        wanted = [(group, replica) for group, replicas in self._wanted.items() for replica in replicas]
        links = [(group, self._links.get(replica.replica_id)) for group, replica in wanted]
        threads = {group: link.thread_id for group, link in links if link is not None and link.thread_id}
        if len(wanted) <= len(self._wanted) and self._cores.is_needed(len(threads)):
            return threads
        self._cores.release()
        return {}
