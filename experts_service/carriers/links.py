"""A coordinator's connections to shards, by replica. Dials them on threads of their own; knows no rows and no groups.

    links.dial(deployment, replica)      # goes on until there is a connection, or the replica has left the table
    …                                    # success makes the replica trusted and raises the table's epoch
    links.take()                         # now `get` has it

A dial can hang for seconds: the node is cut off, or nobody is there to say where the shard listens. The engine's thread
waits for one only when a group has no connection at all. A dial that succeeds brings back a replica that was cut off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from experts_service.carriers.dialer import Dialer, Dialled
from experts_service.carriers.link import Link, LinkLost
from experts_service.routing_table import Deployment, Replica, RoutingTable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0  # between two dials of one replica


@dataclass(slots=True)
class _Dial:
    """Attempts to reach one replica."""

    deployment: Deployment
    replica: Replica
    pause_s: float  # before the next attempt
    failures: int = 0
    reason: str = ""  # of the last failure
    hurried: bool = False  # somebody waits for it


class LaneLinks:
    """One `Link` at most for each replica. Used by one thread, the engine's; only the dials have others."""

    def __init__(self, dialer: Dialer, table: RoutingTable, timeout_s: float) -> None:
        self._dialer = dialer
        self._table = table
        self._timeout_s = timeout_s  # of one dial
        self._links: dict[str, Link] = {}
        self._changed = threading.Condition()  # guards what is below
        self._dialling: dict[str, _Dial] = {}
        self._dialled: dict[str, Dialled] = {}  # connections that the engine's thread has not taken
        self._closed = False

    def get(self, replica_id: str) -> Link | None:
        """A connection that is not known to be lost."""
        link = self._links.get(replica_id)
        return None if link is None or link.lost else link

    def dial(self, deployment: Deployment, replica: Replica) -> None:
        """Have a connection made, unless there is one. One that is under way is hurried by news of the replica."""
        replica_id = replica.replica_id
        with self._changed:
            if self._closed or self.get(replica_id) or replica_id in self._dialled:
                return
            if (under_way := self._dialling.get(replica_id)) is not None:
                if replica.epoch > under_way.replica.epoch:
                    under_way.replica, under_way.hurried = replica, True
                    self._changed.notify_all()
                return
            dial = self._dialling[replica_id] = _Dial(deployment, replica, FIRST_PAUSE_S)
        threading.Thread(target=self._keep_dialling, args=(dial,), name="lane-dial", daemon=True).start()

    def refusal(self, replica_id: str) -> str:
        """Why its last dial failed; nothing while none has."""
        with self._changed:
            dial = self._dialling.get(replica_id)
            return "" if dial is None else dial.reason

    def hurry(self, replica_id: str) -> None:
        """Cut the pause before its next dial short."""
        with self._changed:
            if (dial := self._dialling.get(replica_id)) is not None:
                dial.hurried = True
                self._changed.notify_all()

    def wait(self, replicas: Iterable[Replica], timeout_s: float) -> str:
        """Return once one of these is connected, or each has refused once more; why the last one did, or nothing.

        They are being dialled; a pause between two dials is cut short.
        """
        deadline = time.monotonic() + timeout_s
        wanted = [replica.replica_id for replica in replicas]
        with self._changed:
            failures = {r: self._dialling[r].failures for r in wanted if r in self._dialling}
            for replica_id in failures:
                self._dialling[replica_id].hurried = True
            self._changed.notify_all()
            while True:
                if any(r in self._dialled or self.get(r) for r in wanted):
                    return ""
                under_way = [r for r in failures if r in self._dialling]
                reasons = [self._dialling[r].reason for r in under_way if self._dialling[r].failures > failures[r]]
                if len(reasons) == len(under_way):
                    return reasons[-1] if reasons else "no replica is known"
                if not self._changed.wait(deadline - time.monotonic()):
                    return "it did not answer in time"

    def take(self) -> None:
        """Make links of what was dialled."""
        with self._changed:
            for replica_id, dialled in self._dialled.items():
                if before := self._links.get(replica_id):
                    before.close()
                self._links[replica_id] = Link(*dialled)
            self._dialled.clear()

    def keep_only(self, known: set[str]) -> bool:
        """Let go of replicas that left and owe no answer that somebody waits for. Whether none is left of them."""
        departed = [replica_id for replica_id in self._links if replica_id not in known]
        owing = [replica_id for replica_id in departed if self._links[replica_id].outstanding]
        for replica_id in departed:
            if replica_id not in owing:
                self._links.pop(replica_id).close()
        return not owing

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for dialled in self._dialled.values():
                dialled.channel.close()
            self._dialled.clear()
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _keep_dialling(self, dial: _Dial) -> None:
        replica_id = dial.replica.replica_id
        while True:
            try:
                dialled = self._dialer(dial.replica, self._timeout_s)
            except LinkLost as lost:
                with self._changed:
                    dial.failures, dial.reason, dial.hurried = dial.failures + 1, str(lost), False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or dial.hurried, dial.pause_s)
                    dial.pause_s = min(2 * dial.pause_s, LONGEST_PAUSE_S)
                    known = any(r.replica_id == replica_id for r in self._table.replicas(dial.deployment))
                    if self._closed or not known:
                        del self._dialling[replica_id]
                        self._changed.notify_all()
                        return
                continue
            with self._changed:
                del self._dialling[replica_id]
                if self._closed:
                    dialled.channel.close()
                    return
                # Told of before anybody can ask over it, so that what fails then is no older than the connection; and
                # there for whoever takes it at that news, as no other comes.
                self._table.renew(dial.deployment, replica_id)
                self._dialled[replica_id] = dialled
                self._changed.notify_all()
            return
