"""The deliveries of one dispatch, until each has its answer. Knows rows and numbers; whom to ask is the deliveries'.

Answers are received on the host, straight into the combine buffer where that is there as well. Where finite rows got an
answer with numbers that are not, another replica is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Generic

import torch
from torch import Tensor

from cluster.errors import ExpertUnavailable
from experts_service.delivery.delivery import A, Deliveries, Delivery, Routes, Rows
from experts_service.delivery.replica_load import SPLIT_ROWS, ReplicaLoads
from experts_service.device import pinned
from experts_service.kernels.finite import all_finite
from experts_service.transport import GroupRows

SOON_S = 0.0005  # for this long an answer is looked for without sleeping, if the last ones were there within it


class RemoteFlight(Generic[Rows, A]):
    """Rows of one layer under way to replicas."""

    def __init__(
        self,
        deliveries: Deliveries[Rows, A],
        layer: int,
        rows: Tensor,
        parts: Sequence[GroupRows],
        received: Tensor | None = None,
    ) -> None:
        """`rows` [T, D] on the host; the answers of `parts` are written when `wait` returns.

        `received` [N, D]: where answers that belong on a device are received; None: in memory of its own.
        """
        deliveries.look_at_table()
        self.sent_at = deliveries.clock()
        self.received: Tensor | None = None  # [N, D] on the host
        self._staged_for: Tensor | None = None  # on the device
        if parts:
            answers = parts[0].answers
            if answers.is_cpu:
                self.received = answers
            else:
                self.received = pinned(answers.shape, answers.dtype) if received is None else received
                self._staged_for = answers
        self._shared = deliveries
        self._layer = layer
        self._rows = rows
        self._deadline = self.sent_at + deliveries.timeout_s
        self._parts: list[GroupRows] = []
        self._under_way: list[Delivery[Rows, A]] = []  # of each part

    def post(self, part: GroupRows, rows: Rows) -> None:
        """Ask for one part; does not wait."""
        delivery = Delivery(self._shared, part.group, len(part.row_indices), rows, self._deadline, part.replica_id)
        self._parts.append(part)
        self._under_way.append(delivery)
        delivery.post(self.sent_at)

    def adopt(self, part: GroupRows, rows: Rows, attempt: A, sent_at: float) -> None:
        """One part was asked for at `sent_at` already, of the only replica that could be reached."""
        self.sent_at, self._deadline = sent_at, sent_at + self._shared.timeout_s
        delivery = Delivery(self._shared, part.group, len(part.row_indices), rows, self._deadline)
        self._parts.append(part)
        self._under_way.append(delivery)
        delivery.adopt(attempt, sent_at)

    def wait(self) -> None:
        """Return once every answer is written. Raises ExpertUnavailable, or what a shard says of these rows."""
        shared = self._shared
        started = shared.clock()
        soon = started + SOON_S if shared.answers_soon else started
        waiting = self._under_way
        while waiting:
            for delivery, now in shared.settle(waiting, soon):
                if delivery.answer is None:
                    raise self._failure(delivery)
                shared.counts[delivery.group].observe(now - self.sent_at)
            if waiting is self._under_way:
                shared.answers_soon = shared.clock() - started < SOON_S
            waiting = self._rejected()
        if self._staged_for is not None and self.received is not None:
            # Nobody gets the memory that it is read from before it has been read, though nobody here keeps it.
            self._staged_for.copy_(self.received, non_blocking=True)

    def close(self) -> None:
        for delivery in self._under_way:
            delivery.close()

    def _rejected(self) -> list[Delivery[Rows, A]]:
        """Those that got an answer that is not finite for rows that are, and that another replica is asked for."""
        if self.received is None or all_finite(self.received):
            return []
        under_way = zip(self._parts, self._under_way, strict=True)
        return [delivery for part, delivery in under_way if self._is_wrong(part) and delivery.reject()]

    def _is_wrong(self, part: GroupRows) -> bool:
        assert self.received is not None
        answer = self.received[part.start : part.start + len(part.row_indices)]  # [R, D]
        if math.isfinite(answer.sum(dtype=torch.float32)):  # in fp16 a sum may be too large
            return False
        return math.isfinite(self._rows[torch.from_numpy(part.row_indices)].sum(dtype=torch.float32))

    def _failure(self, delivery: Delivery[Rows, A]) -> Exception:
        return delivery.error or ExpertUnavailable(
            f"expert group {delivery.group} did not answer for layer {self._layer} within "
            f"{self._shared.timeout_s:g} s ({delivery.reason})",
            group=delivery.group,
        )


def pieces(parts: Sequence[GroupRows], routes: Routes, loads: ReplicaLoads) -> list[GroupRows]:
    """Parts whose rows are worth several replicas, shared out among those that can be reached; the others as they are.

    A piece is at least SPLIT_ROWS, and as much of the part as its replica is fast.
    """
    for part in parts:
        if len(part.row_indices) >= 2 * SPLIT_ROWS:
            break
    else:
        return list(parts)
    return [
        piece
        for part in parts
        for piece in split(part, loads.shares(routes.reachable(part.group), len(part.row_indices)))
    ]


def split(part: GroupRows, shares: Sequence[tuple[str | None, int]]) -> list[GroupRows]:
    """The same rows in pieces: for each the replica, None for any, and its number of rows. They add up."""
    if len(shares) < 2:
        return [part]
    ends = [0, *accumulate(part.counts)]  # where each expert's rows end
    cuts = [0, *accumulate(rows for _, rows in shares)]
    return [
        GroupRows(
            part.group,
            part.row_indices[start:end],
            tuple(max(0, min(end, last) - max(start, first)) for first, last in pairwise(ends)),
            part.answers,
            part.start + start,
            replica_id,
        )
        for (replica_id, _), (start, end) in zip(shares, pairwise(cuts), strict=True)
    ]
