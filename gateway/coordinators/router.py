"""Gives each request the coordinator that `choice` ranks first, and streams of tokens the one that they belong to.

Serve builds the router in every process that holds a handle, and pickles this module by value.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.messages import Request, TokenStream
from gateway.coordinators import table
from gateway.coordinators.choice import prefix_of, ranked


class _Coordinator(RunningReplica):  # type: ignore[misc]
    """Tells the table which requests it is sent."""

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        request = _first_request(pr)
        if request is not None:
            table.TABLE.sent(request.key, self.replica_id.unique_id)
        return super().try_send_request(pr, with_rejection)


class CoordinatorRouter(RequestRouter):  # type: ignore[misc]
    """A request is given the replica that was chosen for it.

    Counts what it sends itself: Serve's own queue lengths are what replicas last said, which in a burst is long ago.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ongoing: Counter[ReplicaID] = Counter()
        self._chosen_for: WeakKeyDictionary[asyncio.Task[Any], PendingRequest] = WeakKeyDictionary()

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        return _Coordinator(replica_info)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._ongoing[replica_id] = max(0, self._ongoing[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        table.TABLE.publish(self._deployment_id.app_name, (r.replica_id.unique_id for r in replicas))
        self._ongoing = Counter({replica.replica_id: self._ongoing[replica.replica_id] for replica in replicas})

    def _fulfill_next_pending_request(self, replica: RunningReplica, _: Any = None) -> None:
        """Serve's own finds the request by an id, which the choices of one client request share."""
        pending = self._chosen_for[_this_task()]
        if not pending.future.done():
            self._record_queue_wait_time(pending)
            pending.future.set_result(replica)
            self._remove_pending_request_from_indices(pending)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try in this order; of two, Serve takes the less busy one, and none that is full."""
        await asyncio.sleep(0)  # a request that has just been given a replica is sent now, and counts
        if pending_request is not None:
            self._chosen_for[_this_task()] = pending_request
            pending_request.routing_context.should_backoff = True
            argument = _first_argument(pending_request)
            if isinstance(argument, TokenStream):
                return [[each for each in candidate_replicas if each.replica_id.unique_id == argument.coordinator]]
        request = None if pending_request is None else _first_request(pending_request)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranks = ranked(
            list(by_id),
            {each: self._ongoing[replica.replica_id] for each, replica in by_id.items()},
            table.TABLE.silent,
            failed_on=() if request is None else request.failed_on,
            prefix=None if pending_request is None else prefix_of(_first_argument(pending_request)),
        )
        return [[by_id[each] for each in rank] for rank in ranks]


def _first_request(pending_request: PendingRequest) -> Request | None:
    """What a coordinator is asked; embeddings are asked for together."""
    argument = _first_argument(pending_request)
    first = argument[0] if isinstance(argument, tuple) and argument else argument
    return first if isinstance(first, Request) else None


def _first_argument(pending_request: PendingRequest) -> Any:
    """What a coordinator's method is called with, if anything."""
    return pending_request.args[0] if pending_request.args else None


def _this_task() -> asyncio.Task[Any]:
    """One of Serve's, which finds a replica for one request after the other."""
    task = asyncio.current_task()
    assert task is not None, "this is a coroutine"
    return task
