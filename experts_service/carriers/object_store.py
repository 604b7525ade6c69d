"""Transport `object_store`: direct actor calls to the shards, rows inline or once in Ray's object store.

Works wherever Ray works, across nodes, with nothing else open. An answer belongs to its own call, so a late one is
never read.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from torch import Tensor

from cluster.errors import ExpertUnavailable, MantaError
from cluster.telemetry.metrics import DispatchCounts
from experts_service.delivery.delivery import ANSWERED, CANCELLED, Attempt, Deliveries
from experts_service.delivery.flight import RemoteFlight, pieces
from experts_service.kernels import finite
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard_handles import NoHandle, ShardHandles
from experts_service.transport import Flight, GroupRows

INLINE_BYTES = 100 * 1024  # Ray's own bound for an argument that travels inside the call
MAX_MESSAGE_CHARS = 500
LONGEST_WAIT_S = 0.1  # for all answers at once; then those that have come are looked at

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class CallRows:
    """What a shard is called with."""

    layer: int
    counts: tuple[int, ...]  # rows of each expert
    inline: bytes | None  # the rows [R, D]; None: they are in the store
    batch: Any  # there: the reference of [T, D],
    row_indices: Array  # [R] of it
    place: Tensor  # [R, D] on the host


class CallAttempt(Attempt):
    """One call of a shard."""

    def __init__(self, replica: Replica, epoch: int, place: Tensor) -> None:
        super().__init__(replica, epoch)
        self.reference: Any = None
        self.answer: Array | bytes = b""  # read-only memory of Ray's
        self._place = place

    def accept(self) -> None:
        write(self.answer, self._place)


class CallRoutes:
    """The replicas of the table whose actors are found, or known not to be there."""

    def __init__(self, deployments: Mapping[int, Deployment], table: RoutingTable, handles: ShardHandles) -> None:
        self._deployments = deployments
        self._table = table
        self._handles = handles
        self.calls: dict[Any, str] = {}  # replica ids by reference, until it is known that the call has ended
        self.unwanted: dict[Any, str] = {}  # the same of calls that nobody waits for any more

    def reachable(self, group: int) -> tuple[Replica, ...]:
        is_awaited = self._handles.is_awaited
        replicas = tuple(one for one in self._table.replicas(self._deployments[group]) if not is_awaited(one))
        return tuple(replica for replica in replicas if not replica.suspected) or replicas

    def refusal(self, group: int) -> tuple[Replica | None, str]:
        return None, "its actor has not been found yet" if self._table.replicas(self._deployments[group]) else ""

    def owed(self, replica_id: str) -> int:
        forget_ended(self.calls)
        forget_ended(self.unwanted)
        return [*self.calls.values(), *self.unwanted.values()].count(replica_id)


class CallCarrier:
    """Calls of actors."""

    def __init__(
        self, routes: CallRoutes, handles: ShardHandles, fingerprint: str, of_tiers: Mapping[str, str]
    ) -> None:
        self._routes = routes
        self._handles = handles
        self._fingerprint = fingerprint
        self._of_tiers = of_tiers

    def post(
        self,
        rows: CallRows,
        replica: Replica,
        epoch: int,
        number: int,  # noqa: ARG002  # an answer belongs to its call
        remaining_s: float,  # noqa: ARG002  # Ray has no deadline of a call
        *,
        spare: bool,  # noqa: ARG002  # answers are in memory of Ray's
    ) -> CallAttempt:
        attempt = CallAttempt(replica, epoch, rows.place)
        try:
            shard = self._handles.get(replica, 0.0)  # this is the engine's thread
            attempt.reference = self._call(shard, rows, self._of_tiers.get(replica.tier, self._fingerprint))
            self._routes.calls[attempt.reference] = replica.replica_id
        except NoHandle as error:
            attempt.fail(str(error))
        except RayError as error:
            attempt.fail(type(error).__name__)
        return attempt

    def poll(
        self,
        attempts: Sequence[CallAttempt],
        until: float,
        soon: float,  # noqa: ARG002  # Ray sleeps as it likes
        *,
        each: bool,
    ) -> None:
        timeout_s = min(LONGEST_WAIT_S, max(0.0, until - time.monotonic()))
        references = [attempt.reference for attempt in attempts]
        if each and len(references) > 1:
            ray.wait(references, num_returns=1, timeout=timeout_s)
            timeout_s = 0.0
        try:
            answers = ray.get(references, timeout=timeout_s)
        except RayError:  # one of them failed, or is not there yet
            ended, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for attempt in attempts:
                if attempt.reference in ended:
                    self._finish(attempt)
                    self._routes.calls.pop(attempt.reference, None)
            return
        for attempt, answer in zip(attempts, answers, strict=True):
            attempt.state, attempt.answer = ANSWERED, answer
            self._routes.calls.pop(attempt.reference, None)

    def cancel(self, attempt: CallAttempt, *, silent: bool = False) -> None:  # noqa: ARG002
        attempt.state = CANCELLED
        if replica_id := self._routes.calls.pop(attempt.reference, None):
            self._routes.unwanted[attempt.reference] = replica_id

    def _call(self, shard: Any, rows: CallRows, fingerprint: str) -> Any:
        """Rows travel inside the call, or as the batch that all groups share and the indices of this one's."""
        if rows.inline is None:
            return shard.run.remote(fingerprint, rows.layer, rows.counts, rows.batch, rows.row_indices)
        return shard.run_inline.remote(pickle.dumps((fingerprint, rows.layer, rows.counts, rows.inline)))

    def _finish(self, attempt: CallAttempt) -> None:
        """Take what became of a call that has ended."""
        try:
            attempt.answer = ray.get(attempt.reference)
        except RayTaskError as failure:
            cause = failure.cause
            attempt.fail(f"{type(cause).__name__}: {cause}"[:MAX_MESSAGE_CHARS])
            attempt.raised = True
            # Of one that has another checkpoint, or other numbers of it, no more is to be had; neighbours may answer.
            attempt.error = (
                cause if isinstance(cause, MantaError) and not isinstance(cause, ExpertUnavailable) else None
            )
        except RayError as failure:
            if isinstance(failure, ActorDiedError):
                self._handles.forget(attempt.replica)
            attempt.fail(type(failure).__name__)
        else:
            attempt.state = ANSWERED


class ObjectStoreTransport:
    """Calls the shards of the replicas that the routing table names."""

    takes_device_rows = False

    def __init__(
        self,
        deployments: Mapping[int, Deployment],
        table: RoutingTable,
        handles: ShardHandles,
        *,
        fingerprint: str,
        timeout_s: float,
        of_tiers: Mapping[str, str] | None = None,
        latency: Mapping[int, DispatchCounts] | None = None,
    ) -> None:
        """`of_tiers`: the fingerprint of those that round the checkpoint otherwise than the others."""
        self.deployments = dict(deployments)  # group → its deployment
        self.table = table
        self.latency = latency or {group: DispatchCounts() for group in self.deployments}
        self._routes = CallRoutes(self.deployments, table, handles)
        carrier = CallCarrier(self._routes, handles, fingerprint, of_tiers or {})
        self.deliveries: Deliveries[CallRows, CallAttempt] = Deliveries(
            carrier, self._routes, table, self.deployments, timeout_s, self.latency
        )
        finite.load()  # no answer waits for it

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        forget_ended(self._routes.unwanted)  # Ray keeps an answer for as long as there is a reference to it
        flight = RemoteFlight(self.deliveries, layer, rows, parts)
        if flight.received is None:
            return flight
        batch = as_array(rows)  # [T, D]
        small = max(sum(part.counts) for part in parts) * batch[:1].nbytes <= INLINE_BYTES
        shared = None if small else ray.put(batch)
        parts = pieces(parts, self._routes, self.deliveries.loads)
        try:
            for part in parts:
                place = flight.received[part.start : part.start + len(part.row_indices)]
                inline = batch.take(part.row_indices, axis=0).tobytes() if shared is None else None
                flight.post(part, CallRows(layer, part.counts, inline, shared, part.row_indices, place))
        except BaseException:
            flight.close()
            raise
        return flight

    def close(self) -> None:
        """Nothing here is its own: the handles are the pool's."""


def forget_ended(calls: dict[Any, str]) -> None:
    """Let go of the references of calls that have ended."""
    if calls:
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        for reference in ended:
            del calls[reference]


def as_array(tensor: Tensor) -> Array:
    """The same bytes as numpy, which Ray carries without copying them; bf16 as uint16."""
    tensor = tensor.detach().contiguous()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def write(answer: Array | bytes, out: Tensor) -> None:
    """Copy an answer, read-only memory of Ray's, into its place on the host."""
    place = as_array(out)
    if isinstance(answer, bytes):
        answer = np.frombuffer(answer, place.dtype).reshape(place.shape)
    np.copyto(place, answer)
