"""A shard under simulated time: frames of rows in, answers out, one after the other. Computes nothing but how long.

An answer carries what it was computed from, so that whoever takes it can tell whether it is the one that was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.simulation.world.network import Connection
from cluster.simulation.world.processes import Process

MAX_MERGED_ROWS = 4096  # as `experts_service.shard.server` has it


@dataclass(slots=True)
class Frame:
    """Rows of one attempt, on their way and in the shard's queue."""

    connection: Connection  # that it came by,
    hear: Callable[..., Any]  # and what happens at its other end when there is an answer
    request_id: int
    tag: tuple[str, int, int, int]  # coordinator, step, layer, group: what the rows are
    rows: int
    deadline_s: float  # that were left when it was sent
    arrived: float = 0.0
    deadline: float = 0.0


@dataclass(frozen=True, slots=True)
class ShardCosts:
    """Seconds that one shard takes."""

    batch_s: float = 0.02  # for reading its weights once,
    row_s: float = 0.0001  # and for each row
    load_s: float = 4.0  # from a start until it answers


class Shard:
    """One incarnation."""

    def __init__(self, process: Process, group: int, costs: ShardCosts) -> None:
        self.process = process
        self.group = group
        self.costs = costs
        self.is_draining = False
        self.is_finite = True
        self.raises = False
        self.busy_s = 0.0
        self.queue_s = 0.0
        self.num_frames = 0
        self.num_rows = 0
        self._queue: deque[Frame] = deque()
        self._running: list[Frame] = []

    @property
    def is_idle(self) -> bool:
        return not (self._queue or self._running)

    def receive(self, frame: Frame) -> None:
        frame.arrived = now = self.process.clock()
        frame.deadline = now + frame.deadline_s
        if self.is_draining:
            self._reply(frame, "drains")
            return
        self._queue.append(frame)
        if not self._running:
            self._run_batch()

    def _run_batch(self) -> None:
        """The oldest frame and those of its layer."""
        now = self.process.clock()
        batch: list[Frame] = []
        rows = 0
        for _ in range(len(self._queue)):
            frame = self._queue.popleft()
            if frame.connection.closed[self.process]:
                continue
            if frame.deadline <= now:
                self._reply(frame, "late")
            elif not batch or (frame.tag[2] == batch[0].tag[2] and rows + frame.rows <= MAX_MERGED_ROWS):
                batch.append(frame)
                rows += frame.rows
            else:
                self._queue.append(frame)
        if not batch:
            return
        self._running = batch
        seconds = (self.costs.batch_s + rows * self.costs.row_s) * self.process.slowness
        self.busy_s += seconds
        self.num_rows += rows
        for frame in batch:
            self.num_frames += 1
            self.queue_s += now - frame.arrived
        self.process.after(seconds, self._answer)

    def _answer(self) -> None:
        batch, self._running = self._running, []
        what = "raises" if self.raises else "answers" if self.is_finite else "is not finite"
        for frame in batch:
            self._reply(frame, what)
        if self._queue:
            self._run_batch()

    def _reply(self, frame: Frame, what: str) -> None:
        if not frame.connection.closed[self.process]:
            frame.connection.send(self.process, frame.hear, frame.request_id, what, frame.tag)
