"""Rows of one layer under way over lanes: brings every answer in, whoever dies meanwhile. Chooses nobody itself.

    wait    one recvmsg_into per group, in turn, straight into the combine buffer; the kernel holds the others' answers

Whatever does not go that way (a shard that died, drains, fails or stalls, more rows than a socket holds) is settled by
`_settle`: it polls all groups of the flight at once, asks other replicas, dials again, until the dispatch's deadline.
An answer counts only with the request id, epoch and attempt that were asked for. A replica that takes far longer than
usual is hedged: another one is asked for the same rows, and the first answer counts.
"""

from __future__ import annotations

import math
import select
import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from socket import MSG_DONTWAIT
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import ExpertUnavailable
from cluster.metrics import DispatchCounts
from experts_service.lane_link import Ask, LinkLost
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.transport import GroupRows

MAX_ATTEMPTS = 200  # of one group in one dispatch; its deadline comes first unless shards fail at once
MAX_NOT_FINITE = 2  # answers of a group that are not taken, in one dispatch; then the model itself is not finite there
MAX_ERRORS = 3  # of the maths itself: the same rows would fail everywhere
TRIES_PER_TIMEOUT = 3  # a shard that is silent for this part of the timeout is suspected, if there is another
SOON_S = 0.0005  # for this long an answer is looked for without sleeping, if the last ones were there within it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between attempts, when there is no other replica to ask


@dataclass(slots=True)
class AskedGroup:
    """The rows of one group in one dispatch, or of a part of it that one replica is to run."""

    part: GroupRows
    rows: memoryview  # [R, D] as bytes
    ask: Ask
    sent_at: float
    is_timed: bool = False  # whether its replica is one of several, whose speeds are compared
    hedge_at: float = 0.0  # when another replica is asked as well, if there is one; 0: not again
    hedge: Ask | None = None  # the second one's, into memory of its own
    hedge_id: str = ""  # the second one
    hedged_at: float = 0.0
    replica_id: str = ""
    epoch: int = 0
    attempt: int = 0
    not_finite: int = 0  # answers that were not taken
    retry_at: float = 0.0  # 0: no attempt is put off
    pause_s: float = FIRST_PAUSE_S
    reason: str = "no replica is known"


class Asker(Protocol):
    """Who makes flights: knows the replicas of every group."""

    deployments: Mapping[int, Deployment]  # group → its deployment
    table: RoutingTable
    timeout_s: float
    latency: Mapping[int, DispatchCounts]
    answers_soon: bool  # whether the last flight's were there within SOON_S

    @abstractmethod
    def attempt(self, flight: LaneFlight, group: AskedGroup, remaining_s: float) -> None:
        """Ask a replica. Leaves the reason in `group.ask.failed` when that did not even start."""

    @abstractmethod
    def hedge(self, flight: LaneFlight, group: AskedGroup, remaining_s: float, now: float) -> None:
        """Ask a second replica for the same rows, as soon as there is one."""

    @abstractmethod
    def answered(self, group: AskedGroup, now: float) -> None:
        """Learn from an answer how fast the replicas of its group are; nobody waits for the other answer any more."""

    @abstractmethod
    def others(self, group: AskedGroup) -> list[Replica]:
        """The trusted replicas besides the one that was asked, as far as they are connected."""

    @abstractmethod
    def suspect(self, group: AskedGroup, reason: str) -> None:
        """Tell the routing table that the replica that was asked failed."""

    @abstractmethod
    def give_up(self, group: AskedGroup, reason: str) -> None:
        """End the connection to a replica that does not answer; it is dialled again, and used when that succeeds."""


class LaneFlight:
    """The groups that one dispatch asked."""

    def __init__(self, transport: Asker, layer: int, rows: Tensor, sent_at: float) -> None:
        self.groups: list[AskedGroup] = []
        self.layer = layer
        self.dtype = rows.dtype
        self.hidden = rows.shape[-1]
        self.row_bytes = self.hidden * self.dtype.itemsize
        self._transport = transport
        self._sent_at = sent_at
        self._deadline = sent_at + transport.timeout_s
        self._staged: tuple[Tensor, Tensor] | None = None  # on the host, on the device
        self._received: Tensor | None = None  # [N, D] on the host

    def memory(self, answers: Tensor) -> memoryview:
        """Host memory, as bytes, that the answers [N, D] are received into."""
        if answers.device.type != "cpu":
            staged = torch.empty(answers.shape, dtype=answers.dtype, pin_memory=True)
            self._staged = (staged, answers)
            answers = staged
        self._received = answers
        return answers.view(torch.uint8).numpy().data.cast("B")

    def wait(self) -> None:
        transport, monotonic = self._transport, time.monotonic
        started = now = monotonic()
        sleep_at = started + SOON_S if transport.answers_soon else started
        if any(group.ask.link is not None and group.ask.link.has_unsent for group in self.groups):
            self._settle()  # who has not got all its rows yet shall not wait for another's answer
        for group in self.groups:
            ask = group.ask
            try:
                while not ask.done:
                    link = ask.link
                    if ask.failed or link is None or group.is_timed:
                        self._settle()
                        break
                    link.wait(ask, sleep_at)
            except (BlockingIOError, LinkLost):
                self._settle()
            now = monotonic()
            transport.latency[group.part.group].observe(now - self._sent_at)
        transport.answers_soon = now - started < SOON_S
        while not self._is_finite() and self._doubt():
            self._settle()
        if self._staged is not None:
            staged, answers = self._staged
            answers.copy_(staged, non_blocking=True)

    def _is_finite(self) -> bool:
        """Whether no answer holds NaN or infinity: either would survive the sum."""
        return self._received is None or math.isfinite(self._received.sum())

    def _doubt(self) -> bool:
        """Have other replicas asked where finite rows got an answer that is not; whether there is such a group."""
        doubtful = False
        for group in self.groups:
            rows, answer = (torch.frombuffer(data, dtype=self.dtype) for data in (group.rows, group.ask.memory))
            wrong = math.isfinite(rows.sum()) and not math.isfinite(answer.sum())
            if wrong and group.not_finite < MAX_NOT_FINITE:
                group.not_finite += 1
                group.ask.done, group.ask.failed = False, "its answer is not finite"
                doubtful = True
        return doubtful

    def close(self) -> None:
        """The links skip the answers that have not come."""
        for group in self.groups:
            for ask in (group.ask, group.hedge):
                if ask is not None and not ask.done and ask.link is not None:
                    ask.link.forget(ask)

    def _settle(self) -> None:
        """Go on until every group has answered. Raises ExpertUnavailable at the deadline."""
        while waiting := [group for group in self.groups if not group.ask.done]:
            now = time.monotonic()
            if now >= self._deadline:
                raise self._unavailable(waiting[0])
            for group in waiting:
                self._look_after(group, now)
            self._poll(waiting)
            for group in waiting:
                if group.ask.done and group.is_timed:
                    self._transport.answered(group, time.monotonic())
        for group in self.groups:
            if group.attempt > 1 and group.hedge_id == "":
                self._transport.table.trust(self._transport.deployments[group.part.group], group.replica_id)

    def _look_after(self, group: AskedGroup, now: float) -> None:
        """Ask again where an attempt has failed, or where a replica is silent for too long and there is another."""
        transport, ask = self._transport, group.ask
        if not ask.failed:
            if group.hedge_at and now >= group.hedge_at:
                self._read(group, ask)  # it may have come while this thread did something else
                if ask.done or ask.failed:
                    return
                transport.hedge(self, group, self._deadline - now, now)
            silent = now - group.sent_at > transport.timeout_s / TRIES_PER_TIMEOUT
            if not (silent and transport.others(group)):
                return
            transport.give_up(group, "it is silent")
            ask.failed = "it is silent"
        if group.retry_at == 0.0:
            transport.suspect(group, ask.failed)
            if ask.errors >= MAX_ERRORS or group.attempt >= MAX_ATTEMPTS:
                raise self._unavailable(group)
            if not transport.others(group):
                group.retry_at = now + group.pause_s
                group.pause_s = min(2 * group.pause_s, LONGEST_PAUSE_S)
        if now >= group.retry_at:
            group.retry_at = 0.0
            group.sent_at = now
            transport.attempt(self, group, self._deadline - now)

    def _poll(self, waiting: list[AskedGroup]) -> None:
        """Wait for any of these, or for the next retry, and read and write what is possible."""
        now = time.monotonic()
        due = [self._deadline, now + LONGEST_PAUSE_S]
        due += [at for g in self.groups if not g.ask.done for at in (g.retry_at, g.hedge_at) if at]
        timeout_s = max(0.0, min(due) - now)
        poll = select.poll()
        by_descriptor: dict[int, list[tuple[AskedGroup, Ask]]] = {}
        for group in waiting:
            for ask in (group.ask, group.hedge):
                link = ask.link if ask is not None else None
                if ask is None or ask.failed or link is None or link.lost:
                    continue
                by_descriptor.setdefault(link.channel.fileno(), []).append((group, ask))
                poll.register(link.channel, select.POLLIN | (select.POLLOUT if link.has_unsent else 0))
        if not by_descriptor:
            self._transport.table.wait_for_change(self._transport.table.epoch, timeout_s)
            return
        for descriptor, _ in poll.poll(math.ceil(timeout_s * 1000)):
            for group, ask in by_descriptor[descriptor]:
                self._read(group, ask)

    def _read(self, group: AskedGroup, ask: Ask) -> None:
        """Write and read what one connection is ready for."""
        link = ask.link
        if group.ask.done or link is None:
            return
        with suppress(BlockingIOError, LinkLost):
            link.flush()
            while not (ask.done or ask.failed):
                link.receive(ask, MSG_DONTWAIT)
        if ask is group.hedge and ask.done and not group.ask.done:
            group.ask.memory[:] = ask.memory
            group.ask.done = True
            if group.ask.link is not None:
                group.ask.link.forget(group.ask)

    def _unavailable(self, group: AskedGroup) -> ExpertUnavailable:
        return ExpertUnavailable(
            f"expert group {group.part.group} did not answer for layer {self.layer} within "
            f"{self._transport.timeout_s:g} s ({group.ask.failed or group.reason})",
            group=group.part.group,
        )
