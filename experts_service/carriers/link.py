"""A connection to a shard as the coordinator sees it: rows out, answers to where they belong. Knows no replica.

Writing never blocks: what the shard has no room for yet is kept and sent by `flush`. Reading at the border of two
frames takes the head and, in the same call, the payload into the memory of the answer that is waited for, which is
nearly always the one that comes. Otherwise the bytes are moved to whom they belong. Answers that nobody waits for any
more (another attempt was faster, or the step failed) are skipped: a dropped dispatch leaves the connection in step.

Where both ends share memory, rows and answer may lie in slots of it. Then only heads are sent and read.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from struct import pack

from experts_service.carriers.memory import LaneMemory
from experts_service.delivery.delivery import ANSWERED, POSTED, Attempt
from experts_service.routing_table import Replica
from experts_service.wire.frame import ANSWER, DRAINING, ERROR, FAILED, HEAD_BYTES, FrameError, ReplyHead, read_reply
from experts_service.wire.shared_memory import SharedMemory

WAIT_S = 0.1  # a blocking read returns after this long, so that whoever waits can look at the clock and at others
_SCRATCH_BYTES = 256 * 1024
NOTHING = memoryview(bytearray(0))
NOBODY = Replica("", "", "", 0, "")
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class LinkLost(Exception):
    """The shard's end is gone, or does not speak as it should."""


class LaneAttempt(Attempt):
    """Rows that one shard was asked to run, and the memory for its answer."""

    slot = 0  # as its head says it
    in_device = False  # whether that is one of the shard's GPU
    expected = b""  # the head of the answer
    link: Link | None = None

    def __init__(
        self, replica: Replica, epoch: int, request_id: int, memory: memoryview, place: memoryview | None = None
    ) -> None:
        """`memory`: where the answer is received, as bytes; `place`: where it belongs, if that is elsewhere."""
        super().__init__(replica, epoch)
        self.request_id = request_id
        self.memory = memory
        self.place = place
        self.follows = memory  # what is received of the answer behind its head: nothing where it lies in a slot

    def accept(self) -> None:
        if self.place is not None:
            self.place[:] = self.memory


class Link:
    """One authenticated, blocking socket. Used by one thread."""

    def __init__(self, channel: socket.socket, thread_id: int = 0, memory: SharedMemory | None = None) -> None:
        """`thread_id`: of the shard's thread, if it is on this machine and alone; else 0. `memory`: of both ends."""
        seconds, micros = int(WAIT_S), int(WAIT_S % 1 * 1e6)
        channel.settimeout(None)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, pack("@ll", seconds, micros))
        self.channel = channel
        self.descriptor = channel.fileno()
        self.thread_id = thread_id
        self.memory = None if memory is None else LaneMemory(memory)
        self.lost = False
        self.outstanding: dict[int, LaneAttempt] = {}  # by request id
        self.forgotten: set[int] = set()  # request ids whose answers nobody waits for, and that have not come
        self.unsent: deque[memoryview] = deque()  # what the shard has no room for yet
        self._head = bytearray(HEAD_BYTES)
        self._filled = 0  # bytes of it
        self._present: ReplyHead | None = None  # the frame whose payload is being read
        self._owner: LaneAttempt | None = None  # whose it is; None: nobody's any more
        self._target = memoryview(b"")  # where its payload goes
        self._got = 0
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def send(self, attempt: LaneAttempt, head: bytes, rows: memoryview = NOTHING) -> None:
        """Ask for the rows, given as bytes or in slots; returns at once. Raises LinkLost."""
        self.outstanding[attempt.request_id] = attempt
        attempt.link = self
        sent = 0
        if not self.unsent:
            try:
                sent = self.channel.sendmsg((head, rows), (), _NOW) if len(rows) else self.channel.send(head, _NOW)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._gone(error) from error
        if sent < len(head) + len(rows):
            pieces = memoryview(head)[sent:], rows[max(0, sent - len(head)) :]
            self.unsent.extend(piece for piece in pieces if len(piece))

    def flush(self) -> None:
        """Send what was kept, as far as there is room. Raises LinkLost."""
        while self.unsent:
            piece = self.unsent[0]
            try:
                sent = self.channel.send(piece, _NOW)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._gone(error) from error
            if sent < len(piece):
                self.unsent[0] = piece[sent:]
            else:
                self.unsent.popleft()

    def wait(self, attempt: LaneAttempt, sleep_at: float) -> None:
        """`receive`, but before `sleep_at` on the monotonic clock it leaves its core only to whoever can use it.

        A thread that sleeps is woken tens of microseconds late, on a virtual machine, and finds its caches cold.
        """
        while time.monotonic() < sleep_at:
            try:
                self.receive(attempt, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()
            else:
                return
        self.receive(attempt)

    def receive(self, attempt: LaneAttempt, flags: int = 0) -> None:
        """Read once; it may complete `attempt`, another, or none. Raises BlockingIOError after WAIT_S, and LinkLost."""
        at_border = self._filled == 0
        try:
            if at_border:
                if attempt.slot:
                    count = self.channel.recv_into(self._head, 0, flags)
                else:
                    count = self.channel.recvmsg_into((self._head, attempt.follows), 0, flags)[0]
                if count == HEAD_BYTES + len(attempt.follows) and self._head == attempt.expected:
                    self._answered(attempt)
                    return
            elif self._present is None:
                count = self.channel.recv_into(memoryview(self._head)[self._filled :], 0, flags)
            else:
                count = self.channel.recv_into(self._target[self._got :], 0, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._gone(error) from error
        if count == 0:
            raise self._gone(None)
        if self._present is not None:
            self._got += count
            self._finish()
            return
        self._filled += count
        if self._filled < HEAD_BYTES:
            return
        early = self._filled - HEAD_BYTES  # bytes that were read into the memory of `attempt` on good faith
        self._filled = HEAD_BYTES
        self._begin()
        if self._owner is attempt and self._target is attempt.follows:
            self._got = early
            self._finish()
        else:
            data = bytes(attempt.follows[:early])
            self._finish()
            self._feed(memoryview(data))

    @property
    def is_at_border(self) -> bool:
        """Whether it is alive, and no frame has been read or written in part."""
        return not (self.lost or self._filled or self.unsent)

    def take(self, data: memoryview) -> None:
        """Bytes that somebody else read at the border of two frames. Raises LinkLost."""
        self._feed(data)

    def sent(self, head: bytes | bytearray, count: int, error: OSError | None) -> None:
        """Somebody else sent so many bytes of a head, or had an error: what is left is sent by `flush`."""
        if error is not None:
            self._gone(error)
        else:
            self.unsent.append(memoryview(head)[count:])

    def forget(self, attempt: LaneAttempt) -> None:
        """Its answer, should it come, is nobody's."""
        if self.outstanding.pop(attempt.request_id, None) is not None:
            self.forgotten.add(attempt.request_id)
        if self._owner is attempt:
            self._owner = None
            self._target = memoryview(bytearray(len(self._target)))

    def skip_forgotten(self) -> None:
        """Read the answers that nobody waits for, as far as they have come. Raises LinkLost."""
        nobody = LaneAttempt(NOBODY, 0, 0, memoryview(bytearray(0)))
        with suppress(BlockingIOError):
            while self.forgotten:
                self.receive(nobody, socket.MSG_DONTWAIT)

    def owed(self) -> int:
        """Attempts that the shard has not answered, also those that nobody waits for any more."""
        if self.forgotten:
            with suppress(LinkLost):
                self.skip_forgotten()
        return len(self.outstanding) + len(self.forgotten)

    def give_up(self, reason: str) -> None:
        """Close it although the shard has not: whoever waits for an answer has to ask elsewhere."""
        for attempt in self.outstanding.values():
            if attempt.state is POSTED:
                attempt.fail(reason)
        self.close()

    def close(self) -> None:
        self.lost = True
        self.memory = None  # and with it slots that the shard may still write to
        self.forgotten.clear()
        self.channel.close()
        self.outstanding.clear()
        self.unsent.clear()

    def _begin(self) -> None:
        """A head is complete: find whose it is. Raises LinkLost."""
        try:
            present = read_reply(self._head)
        except FrameError as error:
            raise self._gone(error) from error
        owner = self.outstanding.get(present.request_id)
        if owner is not None and not _same_attempt(self._head, owner.expected):
            owner = None
        if present.kind == ANSWER and owner is not None and self._head != owner.expected:
            raise self._gone(FrameError("an answer of another shape than was asked for"))
        self._present, self._owner, self._got = present, owner, 0
        if present.kind == ANSWER and owner is not None:
            self._target = owner.follows
        else:
            self._target = self._room(present.payload_bytes)

    def _finish(self) -> None:
        """End the present frame if its payload is complete."""
        present, owner = self._present, self._owner
        if present is None or self._got < present.payload_bytes:
            return
        self._present = self._owner = None
        self._filled = 0
        if owner is None:
            if present.request_id in self.forgotten:
                self.forgotten.discard(present.request_id)
                self._free(present.request_id)
            return
        if present.kind == ANSWER:
            self._answered(owner)
            return
        del self.outstanding[owner.request_id]
        self._free(owner.request_id)
        if present.kind == ERROR:
            owner.fail(bytes(self._target[: self._got]).decode(errors="replace") or "an error without words")
            owner.raised = present.flags == FAILED
        elif present.kind == DRAINING:
            owner.fail("it is draining")

    def _answered(self, attempt: LaneAttempt) -> None:
        """Its whole answer has come; one that lies in slots is taken from there, before they are used again."""
        del self.outstanding[attempt.request_id]
        if attempt.slot and self.memory is not None:
            try:
                self.memory.read(attempt.slot, attempt.memory, in_device=attempt.in_device)
            finally:
                self.memory.slots.give_back(attempt.request_id)
        attempt.state = ANSWERED

    def _free(self, request_id: int) -> None:
        """The shard has replied: it reads and writes the slots of that frame no more."""
        if self.memory is not None:
            self.memory.slots.give_back(request_id)

    def _feed(self, data: memoryview) -> None:
        """Take bytes that were read too early."""
        while len(data):
            if self._present is None:
                count = min(len(data), HEAD_BYTES - self._filled)
                self._head[self._filled : self._filled + count] = data[:count]
                self._filled += count
                if self._filled == HEAD_BYTES:
                    self._begin()
            else:
                count = min(len(data), self._present.payload_bytes - self._got)
                self._target[self._got : self._got + count] = data[:count]
                self._got += count
            data = data[count:]
            self._finish()

    def _room(self, size: int) -> memoryview:
        """Scratch for what nobody reads, or reads at once."""
        if size > len(self._scratch):
            self._scratch = memoryview(bytearray(size))
        return self._scratch[:size]

    def _gone(self, error: BaseException | None) -> LinkLost:
        reason = "it closed the connection" if error is None else str(error)
        self.give_up(reason)
        return LinkLost(reason)


def _same_attempt(head: bytearray, expected: bytes) -> bool:
    """Whether request id, epoch, layer and attempt are those that were asked for."""
    return head[8:24] == expected[8:24]
