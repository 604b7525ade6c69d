"""The shard's end of all lanes: one thread that waits in epoll, runs what is there, and answers. Knows no maths itself.

    server = LaneServer(maths, shape, secret=…, fingerprint=…, host="10.0.0.7")
    server.start()
    server.path, server.port          # where it listens
    …
    server.drain(timeout_s)           # refuses new rows, finishes those in flight
    server.close()

Each turn reads what every connection has, then takes the oldest frame and all others of its layer as one batch, so that
rows of several coordinators and microbatches share a matmul. Sockets never block: a slow peer waits alone.

Rows in memory that come while nobody else has anything to say are run by turns that take no Python (`turns`), once
others like them have been run.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ExpertUnavailable
from experts_service.device import pin
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.shard.batch import Maths, Prepare, run_as_one
from experts_service.shard.connection import Connection, PeerLeft, RowsFrame
from experts_service.shard.serve_kernel import EVENTS_CAME, HEAD_CAME, ROWS_CAME
from experts_service.shard.turns import NO_TURNS, KnownRows, TurnCounts, Turns
from experts_service.wire.address import listen_tcp, listen_unix, tuned
from experts_service.wire.device_slots import DeviceSlots
from experts_service.wire.frame import FAILED, LATE, FrameError, LaneShape
from experts_service.wire.handshake import DEVICE, NO_MEMORY, HandshakeRefused, ShardHandshake
from experts_service.wire.receive_buffer import BufferPool
from experts_service.wire.shared_memory import ROWS_PER_SLOT, SharedMemory, create

logger = logging.getLogger(__name__)

MAX_MERGED_ROWS = 4096  # of one batch; a decode step is not to wait for two prefills
MAX_UNPROVEN, MAX_CONNECTIONS = 64, 512  # peers that have not proved themselves; those that have
MAX_MEMORIES = 16  # connections with memory of their own; those beyond send their rows (`MOST_SHARING` in plans)
IDLE_S = 5.0  # longest sleep; nothing is due then, it only bounds the wait
WARNING_PAUSE_S = 1.0  # between two warnings about peers: a flood of them is one line a second

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


@dataclass(frozen=True, slots=True)
class LaneStats:
    """A snapshot of one server, counted since its start."""

    connections: int  # now
    frames: int
    in_memory: int  # those of them whose rows lay in shared memory
    rows: int
    batches: int  # calls of the maths; fewer than frames where frames were merged
    busy_s: float  # in the maths
    queue_s: float  # from arrival to the start of its batch, summed over frames
    late: int  # frames whose deadline had passed before their turn
    refused: int  # peers whose handshake or frames were wrong
    compiled: TurnCounts  # those of all that were run without `maths`


@dataclass(slots=True)
class _UnprovenPeer:
    """A peer that has not proved itself."""

    channel: socket.socket
    handshake: ShardHandshake
    received: bytes = b""


class LaneServer:
    """Serves `maths` to coordinators that know the secret and mean the same checkpoint."""

    def __init__(
        self,
        maths: Maths,
        shape: LaneShape,
        *,
        secret: bytes,
        fingerprint: str,
        host: str | None = None,  # None: no TCP
        directory: Path | None = None,  # of the Unix socket; None: this user's own
        pinned: bool = False,
        device: torch.device | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        """`pinned`: the maths are a GPU's, which reads rows and writes answers by itself. `device`: of whose memory
        coordinators are given some as well.

        `prepare`: has rows like those that it is given run without `maths` from then on.
        """
        self._maths = maths
        self._prepare = prepare
        self._shape = shape
        self._secret = secret
        self._fingerprint = fingerprint
        self._for_gpu = pinned
        self._device = device
        self._pool = BufferPool(shape.dtype, shape.hidden, pinned=pinned)
        self._queue: deque[RowsFrame] = deque()
        self._unproven: dict[int, _UnprovenPeer] = {}  # the oldest first
        self._connections: dict[int, Connection] = {}
        self._sharing: dict[int, Connection] = {}  # those of them that have memory
        self._draining = self._stopping = self._running = False
        self._frames = self._in_memory = self._rows = self._batches = self._late = self._refused = 0
        self._busy_s = self._queue_s = 0.0
        self._warned_at = float("-inf")
        self._accept_again_at: float | None = None
        self._epoll = select.epoll()
        self._turns = Turns(self._epoll.fileno(), shape.num_experts, MAX_MEMORIES) if AVAILABLE else None
        self._cores = os.sched_getaffinity(0)
        self._wake = FileIO(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "r+")  # whoever writes to it closes it
        self._epoll.register(self._wake, _READ)
        unix, self.path = listen_unix(directory)
        self._listeners = {unix.fileno(): unix}
        self.port = 0
        if host is not None:
            tcp = listen_tcp(host)
            self.port = int(tcp.getsockname()[1])
            self._listeners[tcp.fileno()] = tcp
        for descriptor in self._listeners:
            self._epoll.register(descriptor, _READ)
        self._thread = threading.Thread(target=self._serve, name="lane-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """Of the thread that runs the maths, as the kernel knows it."""
        return self._thread.native_id or 0

    def stats(self) -> LaneStats:
        """Raises ExpertUnavailable when the thread is dead: the shard is up then, and cannot serve."""
        if not self._thread.is_alive():
            raise ExpertUnavailable("the thread that serves this shard's lanes has ended")
        compiled = NO_TURNS if self._turns is None else self._turns.counts()
        return LaneStats(
            connections=len(self._connections),
            frames=self._frames + compiled.frames,
            in_memory=self._in_memory + compiled.frames,
            rows=self._rows + sum(compiled.rows),
            batches=self._batches + compiled.frames,
            busy_s=self._busy_s + compiled.ran_s,
            queue_s=self._queue_s,
            late=self._late,
            refused=self._refused,
            compiled=compiled,
        )

    def drain(self, timeout_s: float) -> bool:
        """Refuse new rows from now on; whether all that were in flight have been answered before the timeout."""
        self._draining = True
        if self._turns is not None:
            self._turns.drain()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            unsent = any(connection.wants_to_write for connection in tuple(self._connections.values()))
            has_rows = self._running or (self._turns is not None and self._turns.has_rows)
            if not (self._queue or has_rows or unsent):
                return True
            time.sleep(0.002)
        return False

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        self._stopping = True
        if not self._wake.closed:
            self._wake.write((1).to_bytes(8, sys.byteorder))
        if self._thread.is_alive():
            self._thread.join(5.0)
        else:
            self._end()
        if not self._thread.is_alive():
            self._wake.close()

    def _serve(self) -> None:
        try:
            while not self._stopping:
                ready: Sequence[tuple[int, int]]
                if self._queue:
                    ready = self._epoll.poll(0)
                elif self._turns is None:
                    ready = self._epoll.poll(self._patience())
                else:
                    ready = self._turn(self._turns)
                for descriptor, events in ready:
                    connection = self._connections.get(descriptor)
                    if connection is not None:
                        self._attend(descriptor, connection, events)
                    elif descriptor in self._unproven:
                        self._shake_hands(descriptor)
                    elif descriptor in self._listeners:
                        self._accept(self._listeners[descriptor])
                if self._queue:
                    self._run_batch()
                if self._unproven or self._accept_again_at is not None:
                    self._look_at_the_clock()
        except Exception:
            logger.exception("the lane server ends; coordinators see their connections close")
        finally:
            self._end()

    def _turn(self, turns: Turns) -> Sequence[tuple[int, int]]:
        """Wait, and run what comes alone; events that are to be attended to."""
        resting = [one for one in self._sharing.values() if one.is_at_rest]
        came = turns.run(self._patience(), [one.known for one in resting if one.known is not None])
        if came.outcome == EVENTS_CAME:
            return came.events
        connection = resting[came.which]
        try:
            if came.outcome == HEAD_CAME:
                connection.take(came.num_bytes)
                if came.num_bytes == connection.head_bytes:  # a head and no more, which was looked for
                    self._remember(turns, connection)
            elif came.outcome == ROWS_CAME:
                self._run_known(connection, came.known)
            else:
                connection.answered(came.num_bytes)
        except FrameError as error:
            self._refuse(connection.descriptor, f"closed a lane: {error}")
        except (PeerLeft, OSError):
            self._drop(connection.descriptor)
        else:
            self._adjust(connection)
        turns.rest()
        return ()

    def _remember(self, turns: Turns, connection: Connection) -> None:
        """Have rows that are like those which have just come be known."""
        frame = self._queue[-1] if self._queue else None
        if frame is None or frame.answer is None or connection.known is None:
            return
        head = frame.head
        if head.deadline_ms and head.rows <= ROWS_PER_SLOT:
            prepare = self._prepare
            with suppress(RuntimeError, MemoryError):  # no room for what that takes: they are run all the same
                prepared = None if prepare is None else prepare(head.layer, frame.rows, head.counts, frame.answer)
                connection.known.add(turns, KnownRows(head.layer, frame.rows, frame.answer, prepared))

    def _run_known(self, connection: Connection, index: int) -> None:
        """Run rows of a kind that was checked, and that takes Python."""
        assert connection.known is not None
        known = connection.known.rows[index]
        started = time.monotonic()
        failure = ""
        try:
            answer = self._maths(known.layer, known.rows, connection.counts(), known.answer)
            if answer is not known.answer:
                known.answer.copy_(answer)
        except Exception as error:
            logger.exception("layer %d failed for %d frames", known.layer, 1)
            failure = f"{type(error).__name__}: {error}"
        self._busy_s += time.monotonic() - started
        self._batches += 1
        self._frames += 1
        self._in_memory += 1
        self._rows += len(known.rows)
        if failure:
            frame = connection.frame(known)
            connection.refuse(frame, FAILED, failure)
            self._let_go(frame)
        else:
            connection.answer()

    def _attend(self, descriptor: int, connection: Connection, events: int) -> None:
        """Read from, or write to, one connection."""
        try:
            if events & _WRITE:
                connection.flush()
            if events & ~_WRITE:
                connection.receive()
        except FrameError as error:
            self._refuse(descriptor, f"closed a lane: {error}")
        except (PeerLeft, OSError):
            self._drop(descriptor)
        else:
            self._adjust(connection)

    def _enqueue(self, frame: RowsFrame) -> None:
        if self._draining:
            frame.connection.refuse(frame, 0, "")
            frame.connection.done_with(frame)
        else:
            self._queue.append(frame)

    def _run_batch(self) -> None:
        """Run the oldest frame and those that can run with it, and answer them."""
        self._running = True  # before any is taken from the queue, which a drain looks at
        frames = self._next_batch()
        if not frames:
            self._running = False
            return
        layer = frames[0].head.layer
        started = time.monotonic()
        answers: list[Tensor] = []
        failure = ""
        try:
            batches = [(frame.rows, frame.head.counts, frame.answer) for frame in frames]
            answers = run_as_one(self._maths, layer, batches, for_gpu=self._for_gpu)
        except Exception as error:  # whatever the maths raises is told to those who asked
            logger.exception("layer %d failed for %d frames", layer, len(frames))
            failure = f"{type(error).__name__}: {error}"
        self._busy_s += time.monotonic() - started
        self._batches += 1
        for frame in frames:
            self._frames += 1
            self._in_memory += frame.buffer is None
            self._rows += frame.head.rows
            self._queue_s += started - frame.arrived
        for index, frame in enumerate(frames):
            if failure:
                frame.connection.refuse(frame, FAILED, failure)
            else:
                frame.connection.reply(frame, answers[index])
            self._let_go(frame)
        self._running = False

    def _next_batch(self) -> list[RowsFrame]:
        """Frames of the oldest one's layer. Those whose peer left, or whose deadline passed, are not run."""
        now = time.monotonic()
        if len(self._queue) == 1 and self._queue[0].deadline > now and not self._queue[0].connection.closed:
            return [self._queue.popleft()]
        batch: list[RowsFrame] = []
        rows = 0
        for _ in range(len(self._queue)):
            frame = self._queue.popleft()
            if frame.connection.closed:
                frame.connection.done_with(frame)
            elif frame.deadline <= now:
                self._late += 1
                frame.connection.refuse(frame, LATE, "its deadline passed before its turn")
                self._let_go(frame)
            elif not batch or (frame.head.layer == batch[0].head.layer and rows + frame.head.rows <= MAX_MERGED_ROWS):
                batch.append(frame)
                rows += frame.head.rows
            else:
                self._queue.append(frame)
        return batch

    def _let_go(self, frame: RowsFrame) -> None:
        connection = frame.connection
        connection.done_with(frame)
        if not connection.closed:
            self._adjust(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            channel, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left: let those that we have end
            self._warn(f"cannot accept lanes for a second: {error}")
            for descriptor in self._listeners:
                self._epoll.modify(descriptor, 0)
            self._accept_again_at = time.monotonic() + 1.0
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._refused += 1
            self._warn("too many peers at once; refused one")
            channel.close()
            return
        if len(self._unproven) >= MAX_UNPROVEN:  # a coordinator needs a moment; who says nothing would keep others out
            self._refuse(next(iter(self._unproven)), "too many peers at once; refused the one that has waited longest")
        channel.setblocking(False)
        self._unproven[channel.fileno()] = _UnprovenPeer(
            tuned(channel), ShardHandshake(self._secret, self._fingerprint)
        )
        self._epoll.register(channel.fileno(), _READ)

    def _shake_hands(self, descriptor: int) -> None:
        """Take what a peer has to say; make it a connection, or close it without a word."""
        peer = self._unproven[descriptor]
        try:
            piece = peer.channel.recv(peer.handshake.wants - len(peer.received))
            peer.received += piece
            if not piece:
                self._drop(descriptor)
            elif len(peer.received) == peer.handshake.wants:
                reply = peer.handshake.receive(peer.received)
                peer.received = b""
                if peer.handshake.wants:
                    _say(peer.channel, reply)
                else:
                    memory = self._say_last(peer, reply)
                    del self._unproven[descriptor]
                    connection = Connection(peer.channel, self._shape, self._pool, self._enqueue, memory)
                    self._connections[descriptor] = connection
                    if memory is not None:
                        self._sharing[descriptor] = connection
        except BlockingIOError:
            return
        except HandshakeRefused as error:
            self._refuse(descriptor, f"refused a lane: {error}")
        except OSError:
            self._drop(descriptor)

    def _say_last(self, peer: _UnprovenPeer, proof: bytes) -> SharedMemory | None:
        """Prove ourselves to a peer that has done so, and give it the memory that it asks for, if there is some."""
        if not peer.handshake.wants_memory:
            _say(peer.channel, proof)
            return None
        if peer.channel.family != socket.AF_UNIX or len(self._sharing) >= MAX_MEMORIES:
            _say(peer.channel, proof + NO_MEMORY)
            return None
        try:
            memory, descriptor = create(self._shape.hidden * self._shape.dtype.itemsize)
        except OSError as error:
            self._warn(f"rows of a coordinator on this node are sent, not shared: {error}")
            _say(peer.channel, proof + NO_MEMORY)
            return None
        descriptors = [descriptor]
        try:
            if self._for_gpu and not memory.pin(pin):
                self._warn("rows of a coordinator on this node are sent, not shared: the GPU's driver cannot map them")
                _say(peer.channel, proof + NO_MEMORY)
                return None
            if peer.handshake.wants_memory == DEVICE and self._device is not None:
                descriptors += self._add_device_slots(memory, self._device)
            _say(peer.channel, proof + memory.description, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return memory

    def _add_device_slots(self, memory: SharedMemory, device: torch.device) -> list[int]:
        """Have memory that is shared be on the device as well: that one's descriptor, if it can be."""
        try:
            memory.in_device, descriptor = DeviceSlots.create(memory.answers, device)
        except RuntimeError as error:  # of a device that is gone, too: what is computed there next says so
            self._warn(f"rows of a coordinator on this node lie in the host's memory, not in the GPU's: {error}")
            return []
        return [descriptor]

    def _adjust(self, connection: Connection) -> None:
        """Have epoll report what this connection can go on with."""
        wanted = connection.wanted
        if wanted != connection.reported:
            self._epoll.modify(connection.descriptor, wanted)
            connection.reported = wanted

    def _refuse(self, descriptor: int, message: str) -> None:
        self._refused += 1
        self._warn(message)
        self._drop(descriptor)

    def _drop(self, descriptor: int) -> None:
        if peer := self._unproven.pop(descriptor, None):
            peer.channel.close()
        self._sharing.pop(descriptor, None)
        if connection := self._connections.pop(descriptor, None):
            connection.close()
            with suppress(OSError):
                os.sched_setaffinity(self.thread_id, self._cores)  # that coordinator may have chosen one for us

    def _warn(self, message: str) -> None:
        now = time.monotonic()
        if now - self._warned_at >= WARNING_PAUSE_S:
            self._warned_at = now
            logger.warning("%s", message)

    def _patience(self) -> float:
        """Seconds until something is due."""
        if not self._unproven and self._accept_again_at is None:
            return IDLE_S
        due = [peer.handshake.deadline for peer in self._unproven.values()]
        if self._accept_again_at is not None:
            due.append(self._accept_again_at)
        return min(IDLE_S, max(0.0, min(due) - time.monotonic()))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for descriptor in [d for d, peer in self._unproven.items() if peer.handshake.deadline <= now]:
            self._refuse(descriptor, "refused a lane: the peer took too long to introduce itself")
        if self._accept_again_at is not None and self._accept_again_at <= now:
            self._accept_again_at = None
            for descriptor in self._listeners:
                self._epoll.modify(descriptor, _READ)

    def _end(self) -> None:
        if self._epoll.closed:
            return
        for descriptor in [*self._unproven, *self._connections]:
            self._drop(descriptor)
        for listener in self._listeners.values():
            listener.close()
        self.path.unlink(missing_ok=True)
        self._epoll.close()


def _say(channel: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    """Part of a handshake, which a socket that was just opened has room for. Raises HandshakeRefused, or OSError."""
    given = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    if channel.sendmsg([message], given) < len(message):
        raise HandshakeRefused("the peer does not read")
