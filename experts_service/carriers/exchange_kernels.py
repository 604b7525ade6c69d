"""Heads out and heads in, compiled: what a dispatch does to its connections, in two calls. Knows no replica.

A task begins with a counter that is not used here and what `HEADER` names; then come `FIELDS` int64 for each part. Both
take the parts in turn, and stop at the first that does not go as usual: what it means is the caller's to say.
"""

from __future__ import annotations

import numpy as np

from experts_service.kernels.compiled.jit import AVAILABLE, pointer
from experts_service.kernels.compiled.routine import Routine
from experts_service.wire.frame import ANSWER, HEAD_BYTES, ROWS

if AVAILABLE:
    from numba import carray, types

    from experts_service.kernels.compiled.jit import sched_yield

    _Bytes, _Size = types.voidptr, types.int64
    _send = types.ExternalFunction("send", _Size(types.int32, _Bytes, _Size, types.int32))
    _recv = types.ExternalFunction("recv", _Size(types.int32, _Bytes, _Size, types.int32))
    _memcpy = types.ExternalFunction("memcpy", _Bytes(_Bytes, _Bytes, _Size))
    _clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _Bytes))
    _errno = types.ExternalFunction("__errno_location", _Bytes())

# of a task
NUMBER, ROWS_AT, ROW_BYTES, SLEEP_AT, CLOCK, OUTCOME, HEADER = 1, 2, 3, 4, 5, 6, 8
# of a part: its socket, its head and where the reply's is read, its slot, whose rows, how many; what became of it; then
# where its answers are to stand among all, and where they lie; when they came (ns, monotonic)
SOCKET, HEAD, HEAD_SIZE, REPLY, SLOT, INDICES, COUNT, RESULT, START, ANSWERS, CAME, FIELDS = range(12)

ALL, LATE, UNUSUAL = 1, 2, 3  # outcomes
REPLY_BYTES = 48  # room for a head, in whole words

_WORDS = HEAD_BYTES // 4
_KIND_WORD, _OTHER_KIND = 1, (ROWS ^ ANSWER) << 8  # an answer's head is that of its rows, but for the kind
_NO_WAIT, _NO_SIGNAL, _AGAIN, _MONOTONIC = 0x40, 0x4000, 11, 1


@Routine
def post_rows(task):  # type: ignore[no-untyped-def]
    """Of each part: its rows into its slot, its head into its socket.

    OUTCOME is ALL, or UNUSUAL where a RESULT is not 0: bytes of the head that were sent, or -errno.

    Rows are those of the [T, D] at ROWS_AT that INDICES [R] name; 0: all are its first.
    """
    row_bytes = task[ROW_BYTES]
    task[OUTCOME] = ALL
    for part in range(task[NUMBER]):
        at = HEADER + FIELDS * part
        count, rows, slot = task[at + COUNT], task[ROWS_AT], task[at + SLOT]
        if task[at + INDICES] == 0:
            for r in range(count):
                _memcpy(pointer(slot + r * row_bytes), pointer(rows), row_bytes)
        else:
            indices = carray(pointer(task[at + INDICES]), count, np.int64)
            for r in range(count):
                _memcpy(pointer(slot + r * row_bytes), pointer(rows + indices[r] * row_bytes), row_bytes)
        sent = _send(task[at + SOCKET], pointer(task[at + HEAD]), task[at + HEAD_SIZE], _NO_WAIT | _NO_SIGNAL)
        if sent < 0:
            sent = -np.int64(carray(_errno(), 1, np.int32)[0])
        if sent == task[at + HEAD_SIZE]:
            task[at + RESULT] = 0
        else:
            task[at + RESULT], task[OUTCOME] = sent, UNUSUAL


@Routine
def take_replies(task):  # type: ignore[no-untyped-def]
    """Read the head of each part's answer. OUTCOME is ALL, LATE or UNUSUAL; RESULT 1: it has come.

    Until SLEEP_AT (ns, monotonic) a thread looks and gives its core away between two looks, then it sleeps as long as
    its socket does. Of what is no answer to the part RESULT says -1 - its bytes, which lie at REPLY; -1: the end.
    -1000 - errno: an error.
    """
    clock = carray(pointer(task[CLOCK]), 2, np.int64)
    for part in range(task[NUMBER]):
        at = HEADER + FIELDS * part
        if task[at + RESULT] == 1:
            continue
        head = carray(pointer(task[at + HEAD]), _WORDS, np.uint32)
        reply = carray(pointer(task[at + REPLY]), _WORDS, np.uint32)
        while True:
            _clock_gettime(_MONOTONIC, pointer(task[CLOCK]))
            looks = clock[0] * 1_000_000_000 + clock[1] < task[SLEEP_AT]
            count = _recv(task[at + SOCKET], pointer(task[at + REPLY]), HEAD_BYTES, _NO_WAIT if looks else 0)
            if count < 0:
                error = np.int64(carray(_errno(), 1, np.int32)[0])
                if error == _AGAIN and looks:
                    sched_yield()
                    continue
                if error == _AGAIN:
                    task[OUTCOME] = LATE
                else:
                    task[at + RESULT], task[OUTCOME] = -1000 - error, UNUSUAL
                return
            same = count == HEAD_BYTES
            for word in range(_WORDS):
                same = same and reply[word] == (head[word] ^ (_OTHER_KIND if word == _KIND_WORD else 0))
            if not same:
                task[at + RESULT], task[OUTCOME] = -1 - count, UNUSUAL
                return
            break
        _clock_gettime(_MONOTONIC, pointer(task[CLOCK]))
        task[at + RESULT], task[at + CAME] = 1, clock[0] * 1_000_000_000 + clock[1]
    task[OUTCOME] = ALL


def load() -> None:
    """Compile them now, or read what was compiled."""
    if AVAILABLE:
        post_rows.load()
        take_replies.load()
