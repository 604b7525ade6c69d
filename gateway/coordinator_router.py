"""Chooses the coordinator of a request: the one that has seen its beginning, unless that is much busier than another.

A coordinator's prefix cache is its own, so requests that begin alike have a favourite: the coordinator that wins a
rendezvous hash over their first tokens. Every gateway finds it by itself, and few change when coordinators come
or go. While the favourite is much busier than another, that one is taken. Requests without a favourite go to the less
busy of two. Serve builds the router in every process that holds a handle.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.messages import Request

PREFIX_TOKENS = 32  # what two prompts must share; a shorter one has no favourite, it is as quickly computed anywhere
MOST_BEHIND = 8  # requests of this process that the favourite may have more than the least busy coordinator


class CoordinatorRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """A request is given the replica that was chosen for it.

    The choices of one client request share an id with Serve, which then knows the first of them only: the others are
    given replicas in the order in which they came (FIFOMixin), their prompt being the same. Without it they wait for
    ever.

    Counts what it sends itself: Serve's own queue lengths are what replicas last said, which in a burst is long ago.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ongoing: Counter[ReplicaID] = Counter()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._ongoing[replica_id] = max(0, self._ongoing[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._ongoing = Counter({replica.replica_id: self._ongoing[replica.replica_id] for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try in this order; of two, Serve takes the less busy one, and none that is full."""
        await asyncio.sleep(0)  # a request that has just been given a replica is sent now, and counts
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
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
    request = pending_request.args[0] if pending_request.args else None
    if not isinstance(request, Request) or len(request.prompt_token_ids) < PREFIX_TOKENS:
        return None
    return request.cache_salt.encode() + array("i", request.prompt_token_ids[:PREFIX_TOKENS]).tobytes()


def _weight(prefix: bytes, replica: RunningReplica) -> bytes:
    """The replica of the largest digest is the favourite."""
    return blake2b(prefix + replica.replica_id.unique_id.encode(), digest_size=8).digest()
