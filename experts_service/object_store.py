"""Transport `object_store`: direct actor calls to the shards, rows inline or once in Ray's object store.

Works wherever Ray works, across nodes, with nothing else open. A shard that fails is suspected, and its rows go to
another replica, or to the same one once it is back, until the deadline of the dispatch. Maths without state makes that
safe; an answer belongs to its own call, so a late one is never read. Where finite rows get an answer that is not,
another replica is asked.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor

from cluster.errors import ExpertUnavailable, MantaError
from cluster.metrics import PowerOfTwoBuckets
from experts_service.routing_table import Deployment, RoutingTable
from experts_service.transport import Flight, GroupRows

INLINE_BYTES = 100 * 1024  # Ray's own bound for an argument that travels inside the call
MAX_NOT_FINITE = 2  # answers of a group that are not taken, in one dispatch; then the model itself is not finite there
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between attempts, when there is no other replica to ask

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class _Call:
    """One attempt to have the rows of one group run."""

    part: GroupRows
    method: str
    arguments: tuple[Any, ...]
    replica_id: str = ""
    epoch: int = 0
    reference: Any = None  # None: the call could not even be sent
    error: BaseException | None = None  # why the last attempt failed


class ObjectStoreTransport:
    """Calls the shard of a replica that the routing table names."""

    def __init__(
        self,
        deployments: Mapping[int, Deployment],
        table: RoutingTable,
        *,
        fingerprint: str,
        timeout_s: float,
        latency: Mapping[int, PowerOfTwoBuckets] | None = None,
    ) -> None:
        self.deployments = dict(deployments)  # group → its deployment
        self.table = table
        self.timeout_s = timeout_s
        self.latency = latency or {group: PowerOfTwoBuckets() for group in self.deployments}
        self._fingerprint = fingerprint
        self._shards: dict[str, Any] = {}  # actor handles by name

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        now = time.monotonic()
        batch = as_array(rows)  # [T, D]
        row_bytes = batch[:1].nbytes
        inline = max((sum(part.counts) for part in parts), default=0) * row_bytes <= INLINE_BYTES
        shared = None if inline else ray.put(batch)
        calls = []
        for part in parts:
            if inline:
                rows_of_group = batch.take(part.row_indices, axis=0)  # [R, D]
                packed = pickle.dumps((self._fingerprint, layer, part.counts, rows_of_group.tobytes()))
                call = _Call(part, "run_inline", (packed,))
            else:
                call = _Call(part, "run", (self._fingerprint, layer, part.counts, shared, part.row_indices))
            self.attempt(call)
            calls.append(call)
        return _ObjectStoreFlight(self, layer, rows, calls, now)

    def attempt(self, call: _Call) -> None:
        """Send to a replica, the best one known now. Leaves `call.reference` None when there is none."""
        deployment = self.deployments[call.part.group]
        call.reference = None
        chosen = self.table.choose(deployment)
        if chosen is None:
            return
        replica, call.epoch = chosen
        call.replica_id = replica.replica_id
        try:
            shard = self._shards.get(replica.actor)
            if shard is None:
                shard = self._shards[replica.actor] = ray.get_actor(replica.actor, namespace=replica.namespace)
            call.reference = getattr(shard, call.method).remote(*call.arguments)
        except (RayError, ValueError) as error:  # ValueError: no actor of that name lives
            self.suspect(call, error)

    def suspect(self, call: _Call, error: Exception) -> None:
        call.error = error
        self.table.suspect(self.deployments[call.part.group], call.replica_id, call.epoch)

    def close(self) -> None:
        self._shards.clear()


class _ObjectStoreFlight:
    def __init__(
        self, transport: ObjectStoreTransport, layer: int, rows: Tensor, calls: list[_Call], sent_at: float
    ) -> None:
        self._transport = transport
        self._layer = layer
        self._rows = rows  # [T, D]
        self._calls = calls
        self._sent_at = sent_at
        self._deadline = sent_at + transport.timeout_s

    def wait(self) -> None:
        self._wait_for_all()
        for _ in range(MAX_NOT_FINITE):
            doubted = self._doubted()
            for call in doubted:
                self._transport.suspect(call, ValueError("its answer is not finite"))
                self._transport.attempt(call)
            for call in doubted:
                self._wait_for(call)

    def _doubted(self) -> list[_Call]:
        """Those that got an answer that is not finite for rows that are."""
        if not self._calls or math.isfinite(self._calls[0].part.answers.sum()):
            return []
        return [
            call
            for call in self._calls
            if not math.isfinite(call.part.answer.sum())
            and math.isfinite(self._rows[torch.from_numpy(call.part.row_indices).to(self._rows.device)].sum())
        ]

    def _wait_for_all(self) -> None:
        references = [call.reference for call in self._calls]
        if all(reference is not None for reference in references):
            try:
                answers = ray.get(references, timeout=self._remaining())
            except RayError:
                pass  # one of them; which one, and what to do, is found out below
            else:
                for call, answer in zip(self._calls, answers, strict=True):
                    write(answer, call.part.answer)
                    self._observe(call)
                return
        for call in self._calls:
            self._wait_for(call)

    def close(self) -> None:
        self._calls.clear()  # Ray lets go of answers without a reference

    def _wait_for(self, call: _Call) -> None:
        """One answer, with as many attempts as the deadline allows."""
        deployment = self._transport.deployments[call.part.group]
        pause = FIRST_PAUSE_S
        while True:
            if call.reference is not None:
                try:
                    answer = ray.get(call.reference, timeout=self._remaining())
                except GetTimeoutError as timeout:
                    call.error = call.error or timeout
                    raise self._unavailable(call) from timeout
                except RayTaskError as failure:
                    if isinstance(failure.cause, MantaError):
                        raise failure.cause from None
                    call.error = failure.cause
                    raise self._unavailable(call) from failure
                except RayError as failure:
                    self._transport.suspect(call, failure)
                else:
                    self._transport.table.trust(deployment, call.replica_id)
                    write(answer, call.part.answer)
                    self._observe(call)
                    return
            if not any(not replica.suspected for replica in self._transport.table.replicas(deployment)):
                self._transport.table.wait_for_change(self._transport.table.epoch, min(pause, self._remaining()))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            if self._remaining() <= 0:
                raise self._unavailable(call) from call.error
            self._transport.attempt(call)

    def _observe(self, call: _Call) -> None:
        self._transport.latency[call.part.group].observe(time.monotonic() - self._sent_at)

    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _unavailable(self, call: _Call) -> ExpertUnavailable:
        group = call.part.group
        reason = "no replica is known" if call.error is None else type(call.error).__name__
        return ExpertUnavailable(
            f"expert group {group} did not answer for layer {self._layer} within {self._transport.timeout_s:g} s "
            f"({reason})",
            group=group,
        )


def as_array(tensor: Tensor) -> Array:
    """The same bytes as numpy, which Ray carries without copying them; bf16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def write(answer: Array | bytes, out: Tensor) -> None:
    """Copy an answer, read-only memory of Ray's, into its place in the combine buffer."""
    here = (
        as_array(out)
        if out.device.type == "cpu"
        else np.empty(out.shape, np.uint16 if out.dtype is torch.bfloat16 else np.float32)
    )
    if isinstance(answer, bytes):
        answer = np.frombuffer(answer, here.dtype).reshape(here.shape)
    np.copyto(here, answer)
    if out.device.type != "cpu":
        out.copy_(torch.from_numpy(here).view(out.dtype))
