"""A shard's usual turn, compiled: wait, read the head of rows that came alone, run them, answer, and wait again.

Usual is: one connection has something to say, and that is a head of rows in slots, like one that was checked before,
whose maths is a chain. Python sees none of it. At whatever else happens the call returns, and says how far it came.

Heads are alike where layer, number of rows, slot and number of experts with rows are the same. Which experts have how
many is written into the chain's jobs.

A task begins with a counter that is not used and what is named here; then come the rows of each expert that were run,
all int64. Of each connection it has CONNECTION fields elsewhere, and of each head that one knows ENTRY.
"""

from __future__ import annotations

import numpy as np

from experts_service.kernels.compiled.jit import (
    AVAILABLE,
    call,
    call_in_threads,
    counter,
    exchange,
    kernel,
    number_at,
    pointer,
    seen,
    take_several,
)
from experts_service.kernels.compiled.routine import Routine
from experts_service.kernels.compiled.system_calls import (
    DESCRIPTOR_AT,
    NO_SIGNAL,
    NO_WAIT,
    error_number,
    now,
)
from experts_service.wire.frame import ANSWER, HEAD_BYTES, ROWS
from experts_service.wire.shared_memory import ANSWERED, LOOKED_AT, STATE_BYTES

if AVAILABLE:
    from numba import carray

    from experts_service.kernels.compiled.system_calls import epoll_wait, memcpy, recv, send

# What is waited for, how long, and into what; then what was found (see `serve`).
EPOLL, WAIT_MS, EVENTS, NUM_EVENTS, OUTCOME, WHICH, COUNT, KNOWN, BUCKET = range(1, 10)
# Whom there is; whether rows are in hand, and whether none are to be begun; what runs a chain, alone and in threads.
CONNECTIONS, NUM_CONNECTIONS, IS_BUSY, IS_DRAINING, RUN_CHAIN, PARALLEL = range(10, 16)
# Room for a clock and for a key; how many experts there are; when something else is due (ns, monotonic).
CLOCK, KEY, NUM_EXPERTS, UNTIL = range(16, 20)
# Frames that were run; nanoseconds in epoll, in reading a head, in running its rows, in answering.
FRAMES, WAITED, READ, RAN, SAID = range(20, 25)
COUNTS = 25

# of a connection: its socket, where its heads are read (room for two), the heads that it knows, and its slots' states
SOCKET, HEAD, BUCKETS, KEYS, ENTRIES, STATES, CONNECTION = range(7)
# of a head: its chain, as it is run and as it was made, 0: others run its rows; then of each table of its experts where
# that is, where its jobs are, and the fields of both
CHAIN, FRESH, CHAIN_BYTES, THREADS, TABLES = range(5)
MOST_TABLES = 2
ENTRY = TABLES + 3 * MOST_TABLES

EVENTS_CAME, HEAD_CAME, ROWS_CAME, ANSWER_STUCK = 1, 2, 3, 4  # outcomes
MOST_EVENTS = 64
NUM_BUCKETS, MOST_KNOWN = 4096, 2048
KEY_WORDS = 9

_WORDS = HEAD_BYTES // 4
_KIND, _LAYER, _ROWS, _SLOT, _DEADLINE = 1, 5, 6, 8, 9  # words of a head; ids and epoch are between the first two
_TO_ANSWER = (ROWS ^ ANSWER) << 8
_LOWER, _SHIFT = np.uint32(0xFFFF), np.uint32(16)
_SEED, _PRIME, _MIX = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3), np.uint64(32)
_READABLE = 1


@kernel
def _find(task, at):  # type: ignore[no-untyped-def]
    """The entry that is like the head of a connection; -1: none, or its numbers do not add up."""
    connections = carray(pointer(task[CONNECTIONS]), 1, np.int64)
    num_experts = task[NUM_EXPERTS]
    head = carray(pointer(connections[at + HEAD]), _WORDS + num_experts, np.uint32)
    key = carray(pointer(task[KEY]), KEY_WORDS, np.uint32)
    rows, experts = np.int64(0), np.int64(0)
    for expert in range(num_experts):
        count = np.int64(head[_WORDS + expert])
        rows += count
        experts += count != 0
    key[0], key[1], key[2], key[3] = head[0], head[_KIND], head[_LAYER] & _LOWER, np.uint32(experts)
    for word in range(_ROWS, _WORDS):
        key[word - _ROWS + 4] = head[word]
    key[_DEADLINE - _ROWS + 4] = head[_DEADLINE] != 0
    mixed = _SEED
    for word in range(KEY_WORDS):
        mixed = (mixed ^ np.uint64(key[word])) * _PRIME
    buckets = carray(pointer(connections[at + BUCKETS]), NUM_BUCKETS, np.int64)
    keys = carray(pointer(connections[at + KEYS]), (MOST_KNOWN, KEY_WORDS), np.uint32)
    bucket = np.int64((mixed ^ (mixed >> _MIX)) & np.uint64(NUM_BUCKETS - 1))
    while buckets[bucket] >= 0:
        entry = buckets[bucket]
        same = True
        for word in range(KEY_WORDS):
            same = same and keys[entry, word] == key[word]
        if same:
            return entry if rows == np.int64(head[_ROWS]) else np.int64(-1)
        bucket = (bucket + 1) % NUM_BUCKETS
    task[BUCKET] = bucket
    return np.int64(-1)


@kernel
def _run(task, at, known):  # type: ignore[no-untyped-def]
    """Run the rows that a connection's head names, by the chain of an entry."""
    connections = carray(pointer(task[CONNECTIONS]), 1, np.int64)
    head = carray(pointer(connections[at + HEAD]), _WORDS + task[NUM_EXPERTS], np.uint32)
    entry = carray(pointer(connections[at + ENTRIES] + 8 * ENTRY * known), ENTRY, np.int64)
    for table in range(MOST_TABLES):
        fields = entry[TABLES + 3 * table + 2]
        if fields:
            of_experts = carray(pointer(entry[TABLES + 3 * table]), (task[NUM_EXPERTS], fields), np.int64)
            jobs = carray(pointer(entry[TABLES + 3 * table + 1]), (task[NUM_EXPERTS], fields), np.int64)
            row, job = np.int64(0), 0
            for expert in range(task[NUM_EXPERTS]):
                count = np.int64(head[_WORDS + expert])
                if count:
                    for field in range(fields - 2):
                        jobs[job, field] = of_experts[expert, field]
                    jobs[job, fields - 2], jobs[job, fields - 1] = row, count
                    row += count
                    job += 1
    memcpy(pointer(entry[CHAIN]), pointer(entry[FRESH]), entry[CHAIN_BYTES])
    if entry[THREADS] > 1 and task[PARALLEL] != 0:
        call_in_threads(task[PARALLEL], task[RUN_CHAIN], entry[CHAIN], entry[THREADS])
    else:
        call(task[RUN_CHAIN], number_at(entry[CHAIN]))
    for expert in range(task[NUM_EXPERTS]):
        count = np.int64(head[_WORDS + expert])
        task[COUNTS + expert] += count
    task[FRAMES] += 1


@kernel
def _answer(task, at):  # type: ignore[no-untyped-def]
    """Say that the answer to a connection's head is there. Bytes that were sent, or -errno; all if none had to be."""
    connections = carray(pointer(task[CONNECTIONS]), 1, np.int64)
    head = carray(pointer(connections[at + HEAD]), _WORDS, np.uint32)
    head[_KIND] ^= np.uint32(_TO_ANSWER)
    slot = np.int64(head[_SLOT] >> _SHIFT) - 1
    if exchange(number_at(connections[at + STATES] + STATE_BYTES * slot), LOOKED_AT, ANSWERED) == LOOKED_AT:
        return np.int64(HEAD_BYTES)
    sent = send(connections[at + SOCKET], pointer(connections[at + HEAD]), HEAD_BYTES, NO_WAIT | NO_SIGNAL)
    return sent if sent >= 0 else -error_number()  # type: ignore[no-untyped-call]


@Routine
def serve(task):  # type: ignore[no-untyped-def]
    """Serve until something unusual happens, UNTIL comes, or nothing does within WAIT_MS.

    OUTCOME     EVENTS_CAME    NUM_EVENTS of them, which nobody has attended to
                HEAD_CAME      COUNT bytes were read from connection WHICH, or -errno; if they are a head and no more,
                               no entry is like it, and one belongs into BUCKET
                ROWS_CAME      its head is like that of entry KNOWN, whose rows others run
                ANSWER_STUCK   COUNT bytes of its answer's head were sent, or -errno

    But for the first, IS_BUSY stays 1 until whoever called is done.
    """
    clock = task[CLOCK]
    busy = counter(task, IS_BUSY)
    connections = carray(pointer(task[CONNECTIONS]), task[NUM_CONNECTIONS] * CONNECTION, np.int64)
    began = now(clock)  # type: ignore[no-untyped-call]
    task[OUTCOME], task[NUM_EVENTS] = EVENTS_CAME, 0
    while began < task[UNTIL]:
        number = epoll_wait(task[EPOLL], pointer(task[EVENTS]), MOST_EVENTS, task[WAIT_MS])
        woken = now(clock)  # type: ignore[no-untyped-call]
        task[WAITED] += woken - began
        task[OUTCOME], task[NUM_EVENTS] = EVENTS_CAME, max(number, 0)  # less than 0: interrupted
        if number != 1 or carray(pointer(task[EVENTS]), 1, np.uint32)[0] != _READABLE:
            return
        descriptor = np.int64(carray(pointer(task[EVENTS] + DESCRIPTOR_AT), 1, np.int32)[0])
        at = np.int64(0)
        while at < len(connections) and connections[at + SOCKET] != descriptor:
            at += CONNECTION
        if at == len(connections):
            return
        take_several(busy, 1)  # before anything is read: who drains then either waits for it, or has said so
        if seen(counter(task, IS_DRAINING)) != 0:
            take_several(busy, -1)
            return
        size = HEAD_BYTES + 4 * task[NUM_EXPERTS]
        count = recv(descriptor, pointer(connections[at + HEAD]), 2 * size, NO_WAIT)
        if count < 0:
            count = -error_number()  # type: ignore[no-untyped-call]
        known = np.int64(-1)
        if count == size:
            known = _find(task, at)  # type: ignore[no-untyped-call]
        task[WHICH], task[COUNT], task[KNOWN] = at // CONNECTION, count, known
        if known < 0:
            task[OUTCOME] = HEAD_CAME
            return
        read = now(clock)  # type: ignore[no-untyped-call]
        task[READ] += read - woken
        if carray(pointer(connections[at + ENTRIES] + 8 * ENTRY * known), ENTRY, np.int64)[CHAIN] == 0:
            task[OUTCOME] = ROWS_CAME
            return
        _run(task, at, known)  # type: ignore[no-untyped-call]
        ran = now(clock)  # type: ignore[no-untyped-call]
        task[RAN] += ran - read
        sent = _answer(task, at)  # type: ignore[no-untyped-call]
        began = now(clock)  # type: ignore[no-untyped-call]
        task[SAID] += began - ran
        if sent != HEAD_BYTES:
            task[OUTCOME], task[COUNT] = ANSWER_STUCK, sent
            return
        take_several(busy, -1)
    task[NUM_EVENTS] = 0


def load() -> None:
    """Compile it now, or read what was compiled."""
    if AVAILABLE:
        serve.load()
