"""Handles of shards' actors, found ahead of need on a thread of their own. Knows Ray's names; knows no rows or lanes.

    handles = ShardHandles(table, deployments)  # finds the shard of each replica that the table learns of
    shard = handles.get(replica, timeout_s)     # raises NoHandle when it is not found by then

Ray asks the GCS for a name, and waits a minute for one that stands still. It asks the GCS again before an actor's first
call, for where it lives, so each is called as soon as it is found: from then on rows need no GCS.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from experts_service.routing_table import Deployment, Replica, RoutingTable

logger = logging.getLogger(__name__)


class NoHandle(Exception):
    """The actor of a shard has not been found, and why."""


class ShardHandles:
    """Of the replicas of some deployments. Thread-safe."""

    def __init__(self, table: RoutingTable, deployments: Iterable[Deployment]) -> None:
        self._table = table
        self._deployments = tuple(deployments)
        self._changed = threading.Condition()  # guards what is below; the table's lock is never taken under it
        self._found: dict[str, Any] = {}  # by the actor's name
        self._failures: dict[str, str] = {}  # why it was not found the last time, by the same
        self._wanted: dict[str, Replica] = {}  # who is looked up, and who comes after that
        self._is_looking = False
        self._closed = False
        self._stop_listening = table.listen(self._look_at_table)
        self._look_at_table()

    def get(self, replica: Replica, timeout_s: float) -> Any:
        """The handle. Raises NoHandle when a search fails or lasts longer; one that failed before is made again."""
        actor = replica.actor
        with self._changed:
            if actor not in self._found:
                self._look_up(replica)
                self._changed.wait_for(lambda: actor not in self._wanted, timeout_s)
            if (handle := self._found.get(actor)) is None:
                raise NoHandle(self._failures.get(actor, f"the actor {actor} has not been found yet"))
            return handle

    def is_awaited(self, replica: Replica) -> bool:
        """Whether nothing is known of it yet: neither a handle, nor that there is none."""
        return replica.actor not in self._found and replica.actor not in self._failures

    def forget(self, replica: Replica) -> None:
        """Its actor has died: whoever has the name now is looked up."""
        with self._changed:
            self._found.pop(replica.actor, None)
            self._look_up(replica)

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._found.clear()
            self._wanted.clear()
            self._changed.notify_all()
        self._stop_listening()

    def _look_at_table(self) -> None:
        """Look up who is new, forget who left."""
        listed = {one.actor: one for deployment in self._deployments for one in self._table.replicas(deployment)}
        with self._changed:
            for known in (self._found, self._failures):
                for actor in known.keys() - listed.keys():
                    del known[actor]
            for replica in listed.values():
                if self.is_awaited(replica):
                    self._look_up(replica)

    def _look_up(self, replica: Replica) -> None:
        if self._closed:
            return
        self._wanted.setdefault(replica.actor, replica)
        if not self._is_looking:
            self._is_looking = True
            threading.Thread(target=self._look, name="shard-handles", daemon=True).start()

    def _look(self) -> None:
        """One after the other: where the GCS stands still, none of them is found before it goes on."""
        import ray

        while True:
            with self._changed:
                replica = next(iter(self._wanted.values()), None)
                if replica is None:
                    self._is_looking = False
                    return
            handle, failure = None, ""
            try:
                handle = ray.get_actor(replica.actor, namespace=replica.namespace)
                handle.stats.remote().future().add_done_callback(_heard)
            except Exception as error:  # ValueError: no actor of that name lives. The others are looked up in any case.
                failure = f"the actor {replica.actor} was not found ({type(error).__name__})"
                logger.info("%s: %s", failure, error)
            with self._changed:
                self._wanted.pop(replica.actor, None)
                if self._closed:
                    continue
                if failure:
                    self._failures[replica.actor] = failure
                else:
                    self._found[replica.actor] = handle
                    self._failures.pop(replica.actor, None)
                self._changed.notify_all()


def _heard(answer: Any) -> None:
    """Whatever a shard's first call brings: Ray logs an error that nobody has looked at."""
    answer.exception()
