"""The shard's end of all lanes: one thread that waits in epoll, runs what is there, and answers. Knows no maths itself.

    server = LaneServer(maths, shape, secret=…, fingerprint=…, host="10.0.0.7")
    server.start()
    server.path, server.port          # where it listens
    …
    server.drain(timeout_s)           # refuses new rows, finishes those in flight
    server.close()

Each turn reads what every connection has, then takes the oldest frame and all others of its layer as one batch, so that
rows of several coordinators and microbatches share a matmul. Sockets never block: a slow peer waits alone.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from array import array
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluster.errors import ExpertUnavailable
from experts_service.device import pin
from experts_service.shard.batch import Maths, run_as_one
from experts_service.shard.connection import Connection, PeerLeft, RowsFrame, SlotRequest
from experts_service.wire.address import listen_tcp, listen_unix, tuned
from experts_service.wire.frame import FAILED, LATE, FrameError, LaneShape
from experts_service.wire.handshake import NO_MEMORY, HandshakeRefused, ShardHandshake
from experts_service.wire.receive_buffer import BufferPool
from experts_service.wire.shared_memory import SharedMemory, create

logger = logging.getLogger(__name__)

MAX_MERGED_ROWS = 4096  # of one batch; a decode step is not to wait for two prefills
MAX_UNPROVEN, MAX_CONNECTIONS = 64, 512  # peers that have not proved themselves; those that have
MAX_MEMORIES = 16  # connections with memory of their own; those beyond send their rows
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
    ) -> None:
        """`pinned`: the maths are a GPU's, which reads rows and writes answers by itself."""
        self._maths = maths
        self._shape = shape
        self._secret = secret
        self._fingerprint = fingerprint
        self._for_gpu = pinned
        self._pool = BufferPool(shape.dtype, shape.hidden, pinned=pinned)
        self._queue: deque[RowsFrame] = deque()
        self._unproven: dict[int, _UnprovenPeer] = {}  # the oldest first
        self._connections: dict[int, Connection] = {}
        self._draining = self._stopping = self._running = False
        self._frames = self._in_memory = self._rows = self._batches = self._late = self._refused = 0
        self._busy_s = self._queue_s = 0.0
        self._warned_at = float("-inf")
        self._accept_again_at: float | None = None
        self._epoll = select.epoll()
        self._cores = os.sched_getaffinity(0)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
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
        return LaneStats(
            connections=len(self._connections),
            frames=self._frames,
            in_memory=self._in_memory,
            rows=self._rows,
            batches=self._batches,
            busy_s=self._busy_s,
            queue_s=self._queue_s,
            late=self._late,
            refused=self._refused,
        )

    def drain(self, timeout_s: float) -> bool:
        """Refuse new rows from now on; whether all that were in flight have been answered before the timeout."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            unsent = any(connection.wants_to_write for connection in tuple(self._connections.values()))
            if not (self._queue or self._running or unsent):
                return True
            time.sleep(0.002)
        return False

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        self._stopping = True
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join(5.0)
        else:
            self._end()

    def _serve(self) -> None:
        try:
            while not self._stopping:
                ready = self._epoll.poll(0 if self._queue else self._patience())
                if len(ready) == 1 and ready[0][1] == _READ and not self._queue:
                    connection = self._connections.get(ready[0][0])
                    if connection is not None and connection.has_memory:
                        self._serve_alone(ready[0][0], connection)
                        ready = []
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

    def _serve_alone(self, descriptor: int, connection: Connection) -> None:
        """Nobody else has anything to say: rows in slots are run and answered at once, with nothing made of them."""
        self._running = True  # before anything is read: who drains then either waits for it, or has said so
        try:
            if self._draining:
                self._attend(descriptor, connection, _READ)
            elif (request := connection.receive_alone()) is not None:
                self._run_alone(connection, request)
            else:
                self._adjust(connection)
        except FrameError as error:
            self._refuse(descriptor, f"closed a lane: {error}")
        except (PeerLeft, OSError):
            self._drop(descriptor)
        finally:
            self._running = False

    def _run_alone(self, connection: Connection, request: SlotRequest) -> None:
        layer, rows, place, counts, num_rows = request
        started = time.monotonic()
        failure = ""
        try:
            answer = self._maths(layer, rows, counts, place)
            if answer is not place:
                place.copy_(answer)
        except Exception as error:
            logger.exception("layer %d failed for %d frames", layer, 1)
            failure = f"{type(error).__name__}: {error}"
        self._busy_s += time.monotonic() - started
        self._batches += 1
        self._frames += 1
        self._in_memory += 1
        self._rows += num_rows
        if failure:
            frame = connection.frame_alone(request)
            connection.refuse(frame, FAILED, failure)
            self._let_go(frame)
            return
        connection.reply_alone()
        if connection.wants_to_write:
            self._adjust(connection)

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
        frames = self._next_batch()
        if not frames:
            return
        layer = frames[0].head.layer
        started = time.monotonic()
        self._running = True
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
                    self._connections[descriptor] = Connection(
                        peer.channel, self._shape, self._pool, self._enqueue, memory
                    )
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
        mapped = sum(connection.has_memory for connection in self._connections.values())
        if peer.channel.family != socket.AF_UNIX or mapped >= MAX_MEMORIES:
            _say(peer.channel, proof + NO_MEMORY)
            return None
        try:
            memory, descriptor = create(self._shape.hidden * self._shape.dtype.itemsize)
        except OSError as error:
            self._warn(f"rows of a coordinator on this node are sent, not shared: {error}")
            _say(peer.channel, proof + NO_MEMORY)
            return None
        try:
            if self._for_gpu and not memory.pin(pin):
                self._warn("rows of a coordinator on this node are sent, not shared: the GPU's driver cannot map them")
                _say(peer.channel, proof + NO_MEMORY)
                return None
            _say(peer.channel, proof + memory.description, descriptor)
        finally:
            os.close(descriptor)
        return memory

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
        os.close(self._wake)
        self._epoll.close()


def _say(channel: socket.socket, message: bytes, descriptor: int | None = None) -> None:
    """Part of a handshake, which a socket that was just opened has room for. Raises HandshakeRefused, or OSError."""
    given = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
    if channel.sendmsg([message], given) < len(message):
        raise HandshakeRefused("the peer does not read")
