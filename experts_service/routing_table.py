"""Who serves each expert group, as one process knows it. Plain data behind a lock; knows neither Ray nor tensors.

    epoch 7   expert-0 → (a, b)        Serve published two replicas (the slow truth)
    epoch 8   expert-0 → (b, a?)       a dispatch to `a` failed: suspected, so chosen last (the fast truth)
    epoch 9   expert-0 → (a, b)        `a` announced a new incarnation, or answered: trusted again

A group that is on several tiers has a Serve deployment on each. Their replicas stand together, under the first one.

Every change raises the epoch. A suspicion carries the epoch at which the replica was chosen, and is ignored when the
replica was published or trusted since: bad news of an earlier incarnation says nothing about this one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.errors import ExpertUnavailable


@dataclass(frozen=True, slots=True, order=True)
class Deployment:
    """Identifies a group, by the Serve deployment of its replicas, or of those on its first tier."""

    application: str
    name: str


@dataclass(frozen=True, slots=True)
class Replica:
    """One live copy of a group: what its ExpertService published, which survives a restart of the shard."""

    replica_id: str
    actor: str  # name of the shard's actor
    namespace: str
    group: int
    fingerprint: str
    tier: str = ""  # its Serve deployment's name: a group has one for each of its tiers
    epoch: int = 0  # of the table, when this replica was published or last trusted
    suspected: bool = False


class RoutingTable:
    """Replicas of each deployment, versioned by epoch. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # re-entrant
        self.epoch = 0  # raised by each change; others only read it
        self._replicas: dict[Deployment, tuple[Replica, ...]] = {}
        self._turn = 0
        self._listeners: list[Callable[[], None]] = []

    def replicas(self, deployment: Deployment) -> tuple[Replica, ...]:
        """Trusted replicas first."""
        return self._replicas.get(deployment, ())

    def publish(self, deployment: Deployment, replicas: Iterable[Replica]) -> None:
        """Replace the replicas of a deployment by those that Serve knows. Known ones keep their epoch and suspicion."""
        with self._changed:
            known = {replica.replica_id: replica for replica in self.replicas(deployment)}
            fresh = self.epoch + 1
            self._set(deployment, [known.get(r.replica_id) or replace(r, epoch=fresh) for r in replicas])

    def publish_tier(self, deployment: Deployment, tier: str, replicas: Iterable[Replica]) -> None:
        """The same of those on one tier of the group. Those who were there last stay when nobody is left.

        They have died, and are suspected as soon as they are asked; or their application is being deleted, and they
        live until the streams that need them have ended.
        """
        with self._changed:
            others = [replica for replica in self.replicas(deployment) if replica.tier != tier]
            if together := [*others, *replicas]:
                self.publish(deployment, together)

    def suspect(self, deployment: Deployment, replica_id: str, epoch: int) -> None:
        """A dispatch failed on a replica that was chosen at `epoch`: choose it last from now on."""
        with self._changed:
            stale = [r for r in self.replicas(deployment) if r.replica_id == replica_id and r.epoch > epoch]
            if not stale:
                self._mark(deployment, replica_id, suspected=True)

    def trust(self, deployment: Deployment, replica_id: str) -> None:
        """The replica answered, or said that it has a new shard."""
        with self._changed:
            self._mark(deployment, replica_id, suspected=False)

    def renew(self, deployment: Deployment, replica_id: str) -> None:
        """There is a new connection to the replica: it is trusted, and what failed before says nothing any more."""
        with self._changed:
            fresh = self.epoch + 1
            self._set(
                deployment,
                [
                    replace(r, suspected=False, epoch=fresh) if r.replica_id == replica_id else r
                    for r in self.replicas(deployment)
                ],
            )

    def choose(self, deployment: Deployment) -> tuple[Replica, int] | None:
        """A replica and the present epoch: trusted ones in turn, a suspected one only when there is no other."""
        with self._changed:
            replicas = self.replicas(deployment)
            if not replicas:
                return None
            eligible = [r for r in replicas if not r.suspected] or list(replicas)
            self._turn += 1
            return eligible[self._turn % len(eligible)], self.epoch

    def wait_for(self, deployments: Iterable[Deployment], timeout_s: float) -> None:
        """Return once each deployment has a replica. Raises ExpertUnavailable, naming those without, at the timeout."""
        wanted = tuple(deployments)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while missing := [d.name for d in wanted if not self.replicas(d)]:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise ExpertUnavailable(f"no replica of {', '.join(missing)} was ready within {timeout_s:g} s")

    def wait_for_change(self, epoch: int, timeout_s: float) -> bool:
        """Whether the epoch passed `epoch` before the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self.epoch > epoch, timeout_s)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each change, on the thread that made it. Returns what ends that for good."""
        with self._changed:
            self._listeners.append(listener)

        def stop() -> None:
            with self._changed:
                self._listeners.remove(listener)

        return stop

    def _mark(self, deployment: Deployment, replica_id: str, *, suspected: bool) -> None:
        before = self.replicas(deployment)
        if not any(r.replica_id == replica_id and r.suspected != suspected for r in before):
            return
        fresh = self.epoch + 1
        marked = [
            replace(r, suspected=suspected, epoch=r.epoch if suspected else fresh) if r.replica_id == replica_id else r
            for r in before
        ]
        self._set(deployment, marked)

    def _set(self, deployment: Deployment, replicas: list[Replica]) -> None:
        self.epoch += 1
        self._replicas[deployment] = tuple(sorted(replicas, key=lambda r: r.suspected))
        self._changed.notify_all()
        for listener in tuple(self._listeners):
            listener()


TABLE = RoutingTable()  # this process's, filled by `membership.ExpertRouter`
