"""The usual dispatch over memory, with little Python: a compiled call that posts it, and one that takes its answers.

Usual is: a group has one replica, which shares memory with us, has room in it and answers as it was asked. Whatever
else happens, a late answer, a lost connection, a number that is not finite, makes an ordinary flight of it, with the
attempts that were posted: what to do then is decided there, and nowhere else.

    send    rows into slots, heads out                  post_rows
    wait    heads in                                    take_replies
            the caller adds up the answers where they lie, `release` frees their slots
            or, where they belong on a GPU, they are looked at, and the GPU copies them from there

Where each group's shard shares memory of its GPU, ours gathers rows and copies them there, and they are there before
heads are sent; answers are copied from there, and looked at as copies. Heads and states are the same.

An answer is read where it lies once, number by number, and what was made of it is what is looked at afterwards: a shard
that changes it meanwhile changes its own answer. Its slots are not used again before `release`. What a GPU copies is
looked at before: a shard that changes it after that has changed its own answer, and the step looks at its sums.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from errno import EAGAIN
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from experts_service.carriers import exchange_kernels
from experts_service.carriers.exchange_kernels import (
    ALL,
    ANSWERS,
    CAME,
    FIELDS,
    HEAD_SIZE,
    HEADER,
    LATE,
    OUTCOME,
    OVER,
    REPLY_BYTES,
    RESULT,
    SLEEP_AT,
    START,
    post_rows,
    stop_looking,
    take_replies,
)
from experts_service.carriers.lane_rows import LaneBatch, LaneRows
from experts_service.carriers.link import NOTHING, LaneAttempt, Link, LinkLost
from experts_service.carriers.memory import LaneMemory
from experts_service.carriers.routes import LaneRoutes
from experts_service.delivery.delivery import ANSWERED, POSTED, SILENCES_PER_TIMEOUT, Deliveries
from experts_service.delivery.flight import SOON_S, RemoteFlight
from experts_service.delivery.replica_load import OVERDUE_S
from experts_service.device import on_host, pinned, upload, wait_for_queue
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.finite import all_finite
from experts_service.routing_table import Replica
from experts_service.transport import Answers, GroupRows, InPlaceFlight
from experts_service.wire.frame import DTYPES, HEAD_BYTES, IN_DEVICE, MAX_DEADLINE_MS, RowsFormat, answer_head
from experts_service.wire.shared_memory import STATE_BYTES

_HEADER, _PART = Struct(f"={HEADER}q"), Struct(f"={FIELDS}q")
_WORD = 8
_BF16 = DTYPES[torch.bfloat16]
_KEPT = 8  # spaces; there is one for each microbatch under way


class _Space:
    """What the compiled calls of one flight read and write. It is used again."""

    def __init__(self, num_parts: int, head_bytes: int) -> None:
        self.num_parts = num_parts
        self.head_bytes = -(-head_bytes // _WORD) * _WORD
        self.replies_at = _WORD * (HEADER + FIELDS * num_parts)
        self.heads_at = self.replies_at + REPLY_BYTES * num_parts
        self.clock_at = self.heads_at + self.head_bytes * num_parts
        self.memory = bytearray(self.clock_at + 2 * _WORD)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.words = memoryview(self.memory)[: self.replies_at].cast("q")
        self.table = self.address + _WORD * (HEADER + START)  # of where answers lie
        self.layer = 0
        self.rows: Tensor | None = None  # [T, D]
        self.answers: Tensor | None = None  # [N, D]
        self._received: Tensor | None = None
        self._batch: LaneBatch | None = None

    @property
    def rows_on_host(self) -> Tensor:
        """What an ordinary flight sends."""
        assert self.rows is not None
        if not self.rows.is_cpu:
            self.rows = on_host(self.rows)
        return self.rows

    @property
    def received(self) -> Tensor:
        """Where an ordinary flight receives the answers, on the host."""
        assert self.answers is not None
        if self.answers.is_cpu:
            return self.answers
        if self._received is None:
            self._received = pinned(self.answers.shape, self.answers.dtype)
        return self._received

    @property
    def batch(self) -> LaneBatch:
        """What an ordinary flight asks for: worked out when that does."""
        if self._batch is None:
            self._batch = LaneBatch.of(self.layer, self.rows_on_host, self.received)
        return self._batch

    def forget(self) -> None:
        """Nobody has it any more."""
        self.rows = self.answers = self._received = self._batch = None


class FastAttempt(LaneAttempt):
    """One that has slots. What only an ordinary flight asks for is worked out when it is asked for."""

    is_in_place = False  # its answer has come, and lies in its slots
    place = None
    follows = NOTHING
    head_at = 0  # in the flight's space
    link: Link

    def __init__(
        self,
        space: _Space,
        part: GroupRows,
        replica: Replica,
        epoch: int,
        link: Link,
        shared: LaneMemory,
        in_device: bool,
    ) -> None:
        self.in_device = in_device
        self.space = space
        self.part = part
        self.replica = replica
        self.epoch = epoch
        self.link = link
        self.shared = shared  # mapped for as long as its answer may be read

    @property
    def memory(self) -> memoryview:  # type: ignore[override]
        return self.space.batch.place(self.part)

    @property
    def expected(self) -> bytes:  # type: ignore[override]
        at = self.head_at
        return answer_head(self.space.memory[at : at + HEAD_BYTES])


class FastFlight(InPlaceFlight):
    """Rows of one layer under way. `FastPath.send` makes it."""

    def __init__(self, path: FastPath, space: _Space, parts: Sequence[GroupRows], in_device: bool) -> None:
        self._path = path
        self._in_device = in_device
        self._parts = parts
        self.space = space
        self._sent_at = time.monotonic()
        self.attempts: list[FastAttempt] = []
        self._ordinary: RemoteFlight[LaneRows, LaneAttempt] | None = None

    def wait_in_place(self) -> Answers:
        space = self.space
        if self._ordinary is None and not self._in_device and self._take_answers():
            return Answers(space.table, FIELDS, len(self._parts))
        self.wait()
        space.words[HEADER + START] = 0
        space.words[HEADER + ANSWERS] = self._parts[0].answers.data_ptr()
        return Answers(space.table, FIELDS, 1)

    def wait(self) -> None:
        if not self._copied():
            self._as_ordinary().wait()

    def release(self) -> None:
        if self._ordinary is not None or not self.attempts:
            return
        counts = self._path.deliveries.counts
        at = HEADER + CAME
        for attempt in self.attempts:
            attempt.is_in_place = False
            attempt.shared.slots.give_back(attempt.request_id)
            counts[attempt.part.group].observe(self.space.words[at] * 1e-9 - self._sent_at)
            at += FIELDS
        self.attempts = []
        self._path.give_back(self.space)

    def close(self) -> None:
        if self._ordinary is not None:
            self._ordinary.close()
        if self.attempts:
            self._stop_looking()
        for attempt in self.attempts:
            if attempt.is_in_place:
                attempt.is_in_place = False
                attempt.shared.slots.give_back(attempt.request_id)
            elif attempt.state is POSTED:
                self._path.deliveries.carrier.cancel(attempt)
        self.attempts = []

    def _copied(self) -> bool:
        """Whether the answers belong or lie on a device, have come as asked for, are finite and were copied."""
        answers = self.space.answers
        if self._ordinary is not None or answers is None or (answers.is_cpu and not self._in_device):
            return False
        if not self._take_answers():
            return False
        if self._in_device:
            return self._copied_from_device(answers)
        lying = [attempt.shared.answer(attempt.slot, attempt.part.answer) for attempt in self.attempts]
        if not all(map(all_finite, lying)):
            return False
        for attempt, answer in zip(self.attempts, lying, strict=True):
            attempt.part.answer.copy_(answer, non_blocking=True)
        wait_for_queue(answers.device)
        self.release()
        return True

    def _copied_from_device(self, answers: Tensor) -> bool:
        for attempt in self.attempts:
            shared = attempt.shared
            assert shared.in_device is not None
            shared.in_device.read((attempt.slot - 1) * shared.slot_bytes, attempt.part.answer)
        if not bool(answers.isfinite().all()):  # waits for the copies
            return False
        self.release()
        return True

    def _take_answers(self) -> bool:
        """Whether all answers lie in their slots, each as it was asked for."""
        started = time.monotonic()
        deliveries, space, attempts = self._path.deliveries, self.space, self.attempts
        for attempt in attempts:
            if attempt.state is not POSTED or not attempt.link.is_at_border:
                return False
        words = space.words
        words[SLEEP_AT] = int((started + SOON_S if deliveries.answers_soon else started) * 1e9)
        words[OUTCOME] = LATE
        patience = self._sent_at + min(OVERDUE_S, deliveries.timeout_s / SILENCES_PER_TIMEOUT)
        now = started
        while words[OUTCOME] == LATE and now < patience:
            take_replies.alone(space.address)
            now = time.monotonic()
        self._note_answers()
        if words[OUTCOME] == ALL:
            deliveries.answers_soon = now - started < SOON_S
            return True
        self._hand_over()
        return False

    def _note_answers(self) -> None:
        """Those that lie in their slots, by what the compiled call has found."""
        words, at = self.space.words, HEADER + RESULT
        for attempt in self.attempts:
            if words[at] == 1 and attempt.state is POSTED:
                attempt.link.outstanding.pop(attempt.request_id, None)
                attempt.state = ANSWERED
                attempt.is_in_place = True
            at += FIELDS

    def _stop_looking(self) -> None:
        """Whoever goes on with these attempts hears of them by heads."""
        words, at = self.space.words, HEADER + RESULT
        for attempt in self.attempts:
            if attempt.state is not POSTED:
                words[at] = OVER  # its slots may be another one's by now
            at += FIELDS
        stop_looking.alone(self.space.address)
        self._note_answers()

    def _hand_over(self) -> None:
        """Bytes that are no answer of ours belong to whom they belong."""
        words, space = self.space.words, self.space
        for index, attempt in enumerate(self.attempts):
            size = -1 - words[HEADER + FIELDS * index + RESULT]
            if 0 < size <= HEAD_BYTES:
                words[HEADER + FIELDS * index + RESULT] = 0
                start = space.replies_at + REPLY_BYTES * index
                with suppress(LinkLost):
                    attempt.link.take(memoryview(space.memory)[start : start + size])

    def _as_ordinary(self) -> RemoteFlight[LaneRows, LaneAttempt]:
        """The same as others have it, from now on."""
        if self._ordinary is None:
            self._stop_looking()
            flight: RemoteFlight[LaneRows, LaneAttempt] = RemoteFlight(
                self._path.deliveries, self.space.layer, self.space.rows_on_host, self._parts, self.space.received
            )
            for attempt in self.attempts:
                if attempt.is_in_place:
                    attempt.is_in_place = False
                    attempt.shared.read(attempt.slot, attempt.memory, in_device=attempt.in_device)
                    attempt.shared.slots.give_back(attempt.request_id)
                flight.adopt(attempt.part, (self.space.batch, attempt.part), attempt, self._sent_at)
            self._ordinary, self.attempts = flight, []
        return self._ordinary


class FastPath:
    """Makes such flights. Used by one thread, the engine's."""

    def __init__(
        self,
        deliveries: Deliveries[LaneRows, LaneAttempt],
        routes: LaneRoutes[Link],
        request_ids: Iterator[int],
        before_posting: Callable[[Sequence[GroupRows]], None] | None,
    ) -> None:
        self.deliveries = deliveries
        self._routes = routes
        self._request_ids = request_ids
        self._before_posting = before_posting
        self._deadline_ms = min(MAX_DEADLINE_MS, int(deliveries.timeout_s * 1000))
        self._forms: dict[int, RowsFormat] = {}  # number of experts → format
        self._head_bytes = 0  # of the longest
        self._spaces: list[_Space] = []  # that no flight has
        self.takes_device_rows = False  # whether the last dispatch had slots on GPUs, as the next one will
        if AVAILABLE:
            exchange_kernels.load()

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> FastFlight | None:
        """`rows` [T, D] to all `parts`, or to none of them: None."""
        if not (AVAILABLE and parts and rows.dtype is torch.bfloat16 and rows.is_contiguous()):
            return None
        only = self._routes.only()
        first_found = only.get(parts[0].group)
        first_shared = None if first_found is None else first_found[1].memory
        self.takes_device_rows = in_device = first_shared is not None and first_shared.in_device is not None
        if not (in_device or rows.is_cpu):
            return None
        num_rows, hidden = rows.shape
        row_bytes = 2 * hidden
        space = self._space(len(parts))
        space.layer, space.rows, space.answers = layer, rows, parts[0].answers
        flight = FastFlight(self, space, parts, in_device)
        epoch = self.deliveries.table.epoch
        attempts, memory = flight.attempts, space.memory
        head_at, reply, at = space.heads_at, space.address + space.replies_at, _HEADER.size
        try:
            for part in parts:
                group, indices, counts, _, start, _ = part
                found = only.get(group)
                if found is None:
                    self._give_up(flight)
                    return None
                replica, link = found
                shared = link.memory
                if shared is None or not link.is_at_border or (shared.in_device is not None) is not in_device:
                    self._give_up(flight)
                    return None
                count = len(indices)
                size = count * row_bytes
                request_id = next(self._request_ids)
                first = shared.slots.take(request_id, -(-size // shared.slot_bytes))
                if first is None:
                    self._give_up(flight)
                    return None
                attempt = FastAttempt(space, part, replica, epoch, link, shared, in_device)
                attempt.request_id, attempt.slot, attempt.head_at = request_id, first + 1, head_at
                link.outstanding[request_id] = attempt
                attempts.append(attempt)
                form = self._forms.get(len(counts)) or self._form(len(counts))
                if form.head_bytes > space.head_bytes:  # the first of so many experts
                    self._give_up(flight)
                    return self.send(layer, rows, parts)
                form.pack_into(
                    memory, head_at, _BF16, request_id, epoch, layer, count, hidden, self._deadline_ms, counts,
                    first + 1, size, IN_DEVICE if in_device else 0,
                )  # fmt: skip
                offset = first * shared.slot_bytes
                _PART.pack_into(
                    memory, at, link.descriptor, space.address + head_at, form.head_bytes, reply,
                    shared.requests_at + offset, shared.states_at + first * STATE_BYTES,
                    indices.ctypes.data if num_rows > 1 else 0, count, 0, start, shared.answers_at + offset, 0,
                )  # fmt: skip
                head_at += space.head_bytes
                reply += REPLY_BYTES
                at += _PART.size
            copied = row_bytes  # by the compiled call
            if in_device:
                _write_rows(rows, attempts)
                copied = 0
            _HEADER.pack_into(
                memory, 0, 0, len(parts), rows.data_ptr(), copied, 0, space.address + space.clock_at, 0, 0
            )
            if self._before_posting is not None:
                self._before_posting(parts)
        except BaseException:
            self._give_up(flight)
            raise
        post_rows.alone(space.address)
        if space.words[OUTCOME] != ALL:
            _look_at_sent(flight)
        return flight

    def give_back(self, space: _Space) -> None:
        """No flight reads or writes it any more."""
        space.forget()
        if len(self._spaces) < _KEPT:
            self._spaces.append(space)

    def _give_up(self, flight: FastFlight) -> None:
        """Nobody was told of its slots."""
        for attempt in flight.attempts:
            attempt.link.outstanding.pop(attempt.request_id, None)
            attempt.shared.slots.give_back(attempt.request_id)
        flight.attempts = []
        self.give_back(flight.space)

    def _space(self, num_parts: int) -> _Space:
        while self._spaces:
            space = self._spaces.pop()
            if space.num_parts >= num_parts and space.head_bytes >= self._head_bytes:
                return space
        return _Space(num_parts, self._head_bytes)

    def _form(self, num_experts: int) -> RowsFormat:
        form = self._forms[num_experts] = RowsFormat(num_experts)
        self._head_bytes = max(self._head_bytes, form.head_bytes)
        return form


def _write_rows(rows: Tensor, attempts: Sequence[FastAttempt]) -> None:
    """Gather `rows` [T, D] into slots on GPUs: they are there when this returns."""
    device = attempts[0].part.answers.device
    [indices] = upload([np.concatenate([attempt.part.row_indices for attempt in attempts])], rows.device)
    gathered = rows.index_select(0, indices).to(device)  # [R of all, D]
    start = 0
    for attempt in attempts:
        shared, end = attempt.shared, start + len(attempt.part.row_indices)
        assert shared.in_device is not None
        shared.in_device.write((attempt.slot - 1) * shared.slot_bytes, gathered[start:end])
        start = end
    wait_for_queue(device)


def _look_at_sent(flight: FastFlight) -> None:
    """What a socket had no room for is sent later; one that takes nothing any more is lost."""
    space = flight.space
    for index, attempt in enumerate(flight.attempts):
        at = HEADER + FIELDS * index
        result, size = space.words[at + RESULT], space.words[at + HEAD_SIZE]
        space.words[at + RESULT] = 0
        if result:
            sent = 0 if result == -EAGAIN else result
            error = None if sent >= 0 else OSError(-sent, os.strerror(-sent))
            attempt.link.sent(space.memory[attempt.head_at : attempt.head_at + size], sent, error)
