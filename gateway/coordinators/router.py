"""Chooses the coordinator of a request: the one that has seen its beginning, unless that is much busier than another.

A coordinator's prefix cache is its own, so requests that begin alike have a favourite: the coordinator that wins a
rendezvous hash over their first tokens. Every gateway finds it by itself, and few change when coordinators come
or go. While the favourite is much busier than another, that one is taken. Requests without a favourite go to the less
busy of two, streams of tokens where they belong, and nothing to a coordinator that is silent, unless all are, nor to
one a step of which failed with the request. Serve builds the router in every process that holds a handle.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.messages import Request, TokenStream
from gateway.coordinators import table

PREFIX_TOKENS = 32  # what two prompts must share; a shorter one has no favourite, it is as quickly computed anywhere
MOST_BEHIND = 8  # requests of this process that the favourite may have more than the least busy coordinator


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
        silent = table.TABLE.silent
        speaking = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in silent]
        candidate_replicas = speaking or candidate_replicas
        request = None if pending_request is None else _first_request(pending_request)
        if request is not None and request.failed_on:
            others = [each for each in candidate_replicas if each.replica_id.unique_id not in request.failed_on]
            candidate_replicas = others or candidate_replicas
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        prefix = None if pending_request is None else prefix_of(pending_request)
        if prefix is None or len(candidate_replicas) < 2:
            return [two]
        favourite = max(candidate_replicas, key=lambda replica: _weight(prefix, replica))
        least = min(self._ongoing[replica.replica_id] for replica in candidate_replicas)
        if self._ongoing[favourite.replica_id] - least >= MOST_BEHIND:
            return [[min(candidate_replicas, key=lambda replica: self._ongoing[replica.replica_id])], two]
        return [[favourite], two]


def prefix_of(pending_request: PendingRequest) -> bytes | None:
    """What requests that share a prefix cache's blocks have in common; None for other calls and short prompts."""
    request = _first_argument(pending_request)
    if not isinstance(request, Request) or len(request.prompt_token_ids) < PREFIX_TOKENS:
        return None
    return request.cache_salt.encode() + array("i", request.prompt_token_ids[:PREFIX_TOKENS]).tobytes()


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


def _weight(prefix: bytes, replica: RunningReplica) -> bytes:
    """The replica of the largest digest is the favourite."""
    return blake2b(prefix + replica.replica_id.unique_id.encode(), digest_size=8).digest()
