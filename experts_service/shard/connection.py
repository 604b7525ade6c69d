"""A coordinator's connection as the shard sees it: bytes in, frames out; answers in, bytes out. Never blocks, no maths.

A read takes the head and as many payload bytes as there are in one call, straight into a buffer of the pool. When it
also caught the start of the next frame, that is carried over. A peer that sends slowly keeps a buffer, and one that
does not read its answers keeps those; beyond a bound nothing more is read from it. Nobody else waits for either.

Rows may also lie in memory that both ends map, the host's or the shard's GPU's. They are run from there, and their
answer is written beside them, by the maths itself where it can, before its head is sent. A peer that changes them
meanwhile changes its own answer.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.shard.turns import KnownHeads, KnownRows
from experts_service.wire.frame import (
    ANSWER,
    DRAINING,
    ERROR,
    HEAD_BYTES,
    IN_DEVICE,
    MAX_MESSAGE_BYTES,
    LaneShape,
    RowsFormat,
    RowsHead,
    answer_head,
    refusal_head,
)
from experts_service.wire.receive_buffer import BufferPool, ReceiveBuffer
from experts_service.wire.shared_memory import ROWS_PER_SLOT, SharedMemory

MAX_FRAMES = 16  # of one connection, waiting for their turn; a coordinator has as many as it has microbatches
MAX_UNSENT = 16  # pieces of answers that the peer has not read
COPIED_BYTES = 128 * 1024  # an answer up to this size is copied into the frame's own buffer: cheaper than a new view

NOTHING = memoryview(b"")
_KIND = 5  # where a head says it


class PeerLeft(Exception):
    """The connection ended, as connections do."""


@dataclass(slots=True)
class RowsFrame:
    """Rows of one coordinator, waiting for their turn."""

    connection: Connection
    head: RowsHead
    reply_head: bytes  # of the answer
    rows: Tensor  # [R, D]
    buffer: ReceiveBuffer | None  # that they are in; None: a slot
    answer: Tensor | None  # [R, D], beside the rows in that slot
    arrived: float
    deadline: float


class SlotRows:
    """The rows and answers that a connection's memory holds, as tensors."""

    def __init__(self, memory: SharedMemory, shape: LaneShape) -> None:
        of_all = [(memory.requests, memory.answers)]
        if memory.in_device is not None:
            of_all.append(memory.in_device.halves())
        self._halves = [[half.view(shape.dtype).view(-1, shape.hidden) for half in halves] for halves in of_all]
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # those of few rows come again and again

    def at(self, head: RowsHead) -> tuple[Tensor, Tensor]:
        """The rows [R, D] that a head with a slot names, and where their answer goes."""
        key = head.slot, head.rows, head.flags
        views = self._views.get(key)
        if views is None:
            start, end = (head.slot - 1) * ROWS_PER_SLOT, (head.slot - 1) * ROWS_PER_SLOT + head.rows
            requests, answers = self._halves[head.flags == IN_DEVICE]
            views = requests[start:end], answers[start:end]
            if head.rows <= ROWS_PER_SLOT:
                self._views[key] = views
        return views


class Connection:
    """The bytes of one connection. Used by one thread."""

    def __init__(
        self,
        channel: socket.socket,
        shape: LaneShape,
        pool: BufferPool,
        deliver: Callable[[RowsFrame], None],
        memory: SharedMemory | None = None,
    ) -> None:
        """`memory`: that the peer maps as well."""
        self.channel = channel
        self.descriptor = channel.fileno()
        self.closed = False
        self.waiting = 0  # frames delivered and not answered yet
        self.reported = select.EPOLLIN  # what epoll reports
        self._shape = shape
        self._form = RowsFormat(shape.num_experts)
        self._pool = pool
        self._deliver = deliver
        self._head = bytearray(self._form.head_bytes)
        self._buffer = pool.take()
        self._filled = 0  # bytes of the present frame, head and payload
        self._read: RowsHead | None = None  # its head, once that is complete
        self._unsent: deque[memoryview] = deque()
        self._broken = False
        self._slots = None if memory is None else SlotRows(memory, shape)
        self._num_slots = 0 if memory is None else memory.num_slots
        self._in_device = memory is not None and memory.in_device is not None
        self.head_bytes = len(self._head)
        self._inbox = bytearray(2 * len(self._head))  # what turns read: a head, and whether more follows
        self.known = None if memory is None or not AVAILABLE else KnownHeads(self.descriptor, self._inbox, memory)

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing has been read or written in part, and nothing is owed."""
        return not (self._filled or self._broken or self._unsent or self.waiting)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    @property
    def wanted(self) -> int:
        """What epoll is to report."""
        reads = self.waiting < MAX_FRAMES and len(self._unsent) < MAX_UNSENT
        return (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if self._unsent else 0)

    def receive(self) -> None:
        """Read once, and deliver the frames that are complete. Raises PeerLeft, FrameError, or OSError."""
        if self._broken:
            raise PeerLeft
        head, buffer = self._head, self._buffer
        try:
            if self._filled == 0:
                count = self.channel.recvmsg_into((head, buffer.view))[0]
            elif self._read is None:
                count = self.channel.recv_into(memoryview(head)[self._filled :])
            else:
                got = self._filled - len(head)
                count = self.channel.recv_into(buffer.view[got : self._read.payload_bytes])
        except BlockingIOError:
            return
        self._take(count)

    def take(self, count: int) -> None:
        """The same of what a turn has read; `count`: bytes, or -errno."""
        if count == -errno.EAGAIN:
            return
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        size = self.head_bytes
        self._head[:] = self._inbox[:size]
        extra = max(0, count - size)
        self._buffer.view[:extra] = self._inbox[size : size + extra]
        self._take(count)

    def counts(self) -> tuple[int, ...]:
        """Rows of each expert, by the head that a turn has read."""
        return self._form.counts(self._inbox)

    def frame(self, known: KnownRows) -> RowsFrame:
        """The rows whose head a turn has read, to be answered like others."""
        head = self._form.read(self._inbox, self._shape, self._num_slots, in_device=self._in_device)
        now = time.monotonic()
        self.waiting += 1
        deadline = now + head.deadline_ms / 1000.0
        return RowsFrame(self, head, answer_head(self._inbox), known.rows, None, known.answer, now, deadline)

    def answer(self) -> None:
        """The answer to the head that a turn has read lies in its slots."""
        self._inbox[_KIND] = ANSWER
        try:
            self.answered(self.channel.send(memoryview(self._inbox)[:HEAD_BYTES]))
        except OSError as error:
            self.answered(-(error.errno or errno.EIO))

    def answered(self, count: int) -> None:
        """So many bytes of the head of an answer, which lies where heads are read, have been sent, or -errno."""
        if count < 0 and count != -errno.EAGAIN:
            self._break()
        if count < HEAD_BYTES:
            self._keep(bytes(self._inbox[:HEAD_BYTES]), NOTHING, max(0, count))

    def _take(self, count: int) -> None:
        """So many bytes have come."""
        if count == 0:
            raise PeerLeft
        self._filled += count
        while self._filled >= len(self._head) and self._complete_frame():
            pass

    def reply(self, frame: RowsFrame, answer: Tensor) -> None:
        """Send `answer` [R, D], contiguous, on the host; one that lies in its slot is there already."""
        size = frame.head.payload_bytes
        if answer is frame.answer:
            self._say(frame.reply_head, NOTHING)
        elif size <= COPIED_BYTES and frame.buffer is not None:
            frame.rows.copy_(answer)
            payload = frame.buffer.view[:size]
            sent = self._send(frame.reply_head, payload)
            if sent < len(frame.reply_head) + size:
                self._keep(frame.reply_head, memoryview(bytes(payload)), sent)  # the buffer is used again at once
        else:
            self._say(frame.reply_head, answer.view(torch.uint8).numpy().data.cast("B"))

    def refuse(self, frame: RowsFrame, flags: int, message: str) -> None:
        """Say that the rows were not run: an error, or with flags 0 that the shard drains."""
        payload = memoryview(message.encode()[:MAX_MESSAGE_BYTES])
        self._say(refusal_head(frame.reply_head, ERROR if flags else DRAINING, flags, len(payload)), payload)

    def done_with(self, frame: RowsFrame) -> None:
        """The frame was answered, or will never be: its buffer is free."""
        self.waiting -= 1
        if frame.buffer is not None:
            self._pool.give_back(frame.buffer)

    def flush(self) -> None:
        """Send what the peer had no room for. Raises OSError."""
        while self._unsent:
            piece = self._unsent[0]
            try:
                sent = self.channel.send(piece)
            except BlockingIOError:
                return
            if sent < len(piece):
                self._unsent[0] = piece[sent:]
            else:
                self._unsent.popleft()

    def close(self) -> None:
        """Idempotent. Frames that were delivered keep their buffers until they are let go."""
        if not self.closed:
            self.closed = True
            self.channel.close()
            self._unsent.clear()
            self._slots = None  # frames that are being run keep it mapped
            self.known = None
            self._pool.give_back(self._buffer)

    def _say(self, head: bytes, payload: memoryview) -> None:
        """Send a frame, now or later; its payload stays as it is until then."""
        sent = self._send(head, payload)
        if sent < len(head) + len(payload):
            self._keep(head, payload, sent)

    def _send(self, head: bytes, payload: memoryview) -> int:
        """Bytes that the peer's side took at once."""
        if self._unsent or self._broken:
            return 0
        try:
            return self.channel.sendmsg((head, payload))
        except BlockingIOError:
            return 0
        except OSError:
            self._break()
            return 0

    def _break(self) -> None:
        """The next read says so to whoever owns this connection."""
        self._broken = True
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def _keep(self, head: bytes, payload: memoryview, sent: int) -> None:
        """What is left of a frame is sent later."""
        if not self._broken:
            pieces = memoryview(head)[sent:], payload[max(0, sent - len(head)) :]
            self._unsent.extend(piece for piece in pieces if len(piece))

    def _complete_frame(self) -> bool:
        """Deliver the present frame if it is complete; whether bytes of the next one are there already."""
        head = self._read
        if head is None:
            self._read = head = self._form.read(self._head, self._shape, self._num_slots, in_device=self._in_device)
            if not head.slot and head.payload_bytes > self._buffer.capacity:
                self._grow(head.payload_bytes, self._filled - len(self._head))
        size = 0 if head.slot else head.payload_bytes  # of what follows the head
        surplus = self._filled - len(self._head) - size
        if surplus < 0:
            return False
        now = time.monotonic()
        reply_head, here = answer_head(self._head), self._buffer
        buffer = answer = None
        if head.slot and self._slots is not None:
            rows, answer = self._slots.at(head)
        else:
            rows, buffer = here.rows(head.rows), here
            self._buffer = self._pool.take(surplus)
        self._filled, self._read = surplus, None
        if surplus:
            extra = here.view[size : size + surplus]
            in_head = min(surplus, len(self._head))
            self._head[:in_head] = extra[:in_head]
            self._buffer.view[: surplus - in_head] = extra[in_head:]
        self.waiting += 1
        deadline = now + head.deadline_ms / 1000.0
        self._deliver(RowsFrame(self, head, reply_head, rows, buffer, answer, now, deadline))
        return surplus > 0

    def _grow(self, size: int, filled: int) -> None:
        larger = self._pool.take(size)
        larger.view[:filled] = self._buffer.view[:filled]
        self._pool.give_back(self._buffer)
        self._buffer = larger
