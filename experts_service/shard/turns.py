"""Turns of a shard that take no Python: what its compiled call reads and writes. Knows connections; knows no maths.

    came = turns.run(patience_s, heads)    # of each connection those that it knows; returns at what is not usual
    ...
    heads[came.which].add(turns, rows)     # the next like these are usual

What a turn has read is its caller's to see to, who says `rest` when that is done.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
from torch import Tensor

from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.routine import parallel_address
from experts_service.kernels.compiled.system_calls import CLOCK_BYTES, DESCRIPTOR_AT, EVENT_BYTES
from experts_service.kernels.swiglu import Prepared
from experts_service.shard import serve_kernel
from experts_service.shard.serve_kernel import serve
from experts_service.wire.shared_memory import SharedMemory

_EVENT = Struct(f"=I{DESCRIPTOR_AT - 4}xi{EVENT_BYTES - DESCRIPTOR_AT - 4}x")


class KnownRows(NamedTuple):
    """Rows that lie at one place in slots, and where their answers go."""

    layer: int
    rows: Tensor  # [R, D]
    answer: Tensor  # [R, D]
    prepared: Prepared | None  # what runs them; None: that takes Python


class KnownHeads:
    """What one connection's peer has asked for, and was checked: it comes again and again."""

    def __init__(self, descriptor: int, head: bytearray, memory: SharedMemory) -> None:
        """`head`: where the heads that come over the socket `descriptor` are read."""
        self.rows: list[KnownRows] = []
        self._head = ctypes.c_char.from_buffer(head)
        self._memory = memory
        self._buckets = np.full(serve_kernel.NUM_BUCKETS, -1, np.int64)
        self._keys = np.empty((serve_kernel.MOST_KNOWN, serve_kernel.KEY_WORDS), np.uint32)
        self._entries = np.empty((serve_kernel.MOST_KNOWN, serve_kernel.ENTRY), np.int64)
        self.fields = np.array(
            [
                descriptor,
                ctypes.addressof(self._head),
                *(array.ctypes.data for array in (self._buckets, self._keys, self._entries)),
                memory.states.data_ptr(),
            ],
            np.int64,
        )  # of a connection, for the compiled call

    def add(self, turns: Turns, known: KnownRows) -> None:
        """Rows like those of the head that `turns` has just read."""
        index = len(self.rows)
        if index == serve_kernel.MOST_KNOWN:
            self._buckets.fill(-1)
            self.rows.clear()
            return  # what was read belonged between others
        entry = np.zeros(serve_kernel.ENTRY, np.int64)
        if (prepared := known.prepared) is not None:
            entry[serve_kernel.CHAIN : serve_kernel.TABLES] = prepared.chain.place
            of_tables = [
                (table.data_ptr(), jobs.data_ptr(), table.shape[1])
                for table, jobs in zip(prepared.tables, prepared.jobs, strict=True)
            ]
            flat = [number for of_table in of_tables for number in of_table]
            entry[serve_kernel.TABLES :][: len(flat)] = flat
        self._entries[index], self._keys[index] = entry, turns.key
        self._buckets[turns.words[serve_kernel.BUCKET]] = index
        self.rows.append(known)


class Came(NamedTuple):
    """What a turn returned at."""

    outcome: int
    which: int  # the connection that it is about
    num_bytes: int  # of its head that were read or sent, or -errno
    known: int  # the index of its rows, if others are to run them
    events: Sequence[tuple[int, int]]  # descriptor and event


class TurnCounts(NamedTuple):
    """What was run without Python."""

    frames: int
    rows: tuple[int, ...]  # of each expert
    waited_s: float
    read_s: float
    ran_s: float
    said_s: float


NO_TURNS = TurnCounts(0, (), 0.0, 0.0, 0.0, 0.0)


class Turns:
    """Those of one server. Used by its thread; others may look at `counts`, and may have it drain."""

    def __init__(self, epoll: int, num_experts: int, most_connections: int) -> None:
        self.words = np.zeros(serve_kernel.COUNTS + num_experts, np.int64)
        self.key = np.zeros(serve_kernel.KEY_WORDS, np.uint32)
        self._events = np.zeros(serve_kernel.MOST_EVENTS * EVENT_BYTES, np.uint8)
        self._connections = np.zeros((most_connections, serve_kernel.CONNECTION), np.int64)
        self._clock = np.zeros(CLOCK_BYTES, np.uint8)
        words = self.words
        words[serve_kernel.EPOLL] = epoll
        words[serve_kernel.EVENTS] = self._events.ctypes.data
        words[serve_kernel.CONNECTIONS] = self._connections.ctypes.data
        words[serve_kernel.RUN_CHAIN] = Chain.runner()
        words[serve_kernel.PARALLEL] = parallel_address()
        words[serve_kernel.CLOCK] = self._clock.ctypes.data
        words[serve_kernel.KEY] = self.key.ctypes.data
        words[serve_kernel.NUM_EXPERTS] = num_experts
        self._address = words.ctypes.data
        serve.load()

    def run(self, patience_s: float, heads: Sequence[KnownHeads]) -> Came:
        """Serve connections that owe nothing, until something unusual comes, or nothing for so long."""
        words = self.words
        for index, of_connection in enumerate(heads):
            self._connections[index] = of_connection.fields
        words[serve_kernel.NUM_CONNECTIONS] = len(heads)
        words[serve_kernel.WAIT_MS] = math.ceil(1000 * patience_s)
        words[serve_kernel.UNTIL] = time.monotonic_ns() + int(1e9 * max(patience_s, 1e-3))
        serve.alone(self._address)
        outcome = int(words[serve_kernel.OUTCOME])
        if outcome == serve_kernel.EVENTS_CAME:
            size = int(words[serve_kernel.NUM_EVENTS]) * EVENT_BYTES
            events = [(descriptor, event) for event, descriptor in _EVENT.iter_unpack(self._events[:size].data)]
            return Came(outcome, -1, 0, -1, events)
        which, count, known = (int(words[at]) for at in (serve_kernel.WHICH, serve_kernel.COUNT, serve_kernel.KNOWN))
        return Came(outcome, which, count, known, ())

    @property
    def has_rows(self) -> bool:
        """Whether rows have been read, and not answered or handed on."""
        return bool(self.words[serve_kernel.IS_BUSY])

    def rest(self) -> None:
        """What a turn returned at has been seen to."""
        self.words[serve_kernel.IS_BUSY] = 0

    def drain(self) -> None:
        """Read nothing more."""
        self.words[serve_kernel.IS_DRAINING] = 1

    def counts(self) -> TurnCounts:
        words = self.words
        waited, read, ran, said = (1e-9 * int(ns) for ns in words[serve_kernel.WAITED : serve_kernel.COUNTS])
        return TurnCounts(
            int(words[serve_kernel.FRAMES]), tuple(words[serve_kernel.COUNTS :].tolist()), waited, read, ran, said
        )
