"""Heads out and heads in, compiled: what a dispatch does to its connections, in two calls. Knows no replica.

A task begins with a counter that is not used here and what `HEADER` names; then come `FIELDS` int64 for each part. Both
take the parts in turn, and stop at the first that does not go as usual: what it means is the caller's to say.
"""

from __future__ import annotations

import numpy as np

from experts_service.kernels.compiled.jit import AVAILABLE, exchange, kernel, number_at, pointer, seen
from experts_service.kernels.compiled.routine import Routine
from experts_service.kernels.compiled.system_calls import AGAIN, NO_SIGNAL, NO_WAIT, error_number, now
from experts_service.wire.frame import ANSWER, HEAD_BYTES, ROWS
from experts_service.wire.shared_memory import ANSWERED, LOOKED_AT

if AVAILABLE:
    from numba import carray

    from experts_service.kernels.compiled.system_calls import memcpy, recv, sched_yield, send

# of a task
NUMBER, ROWS_AT, ROW_BYTES, SLEEP_AT, CLOCK, OUTCOME, HEADER = 1, 2, 3, 4, 5, 6, 8
# of a part: its socket, its head and where the reply's is read, its slot and that one's state, whose rows, how many;
# what became of it; then where its answers are to stand among all, and where they lie; when they came (ns, monotonic)
SOCKET, HEAD, HEAD_SIZE, REPLY, SLOT, STATE, INDICES, COUNT, RESULT, START, ANSWERS, CAME, FIELDS = range(13)

ALL, LATE, UNUSUAL = 1, 2, 3  # outcomes
OVER = 2  # a result: nobody waits for this one
REPLY_BYTES = 48  # room for a head, in whole words

_WORDS = HEAD_BYTES // 4
_KIND_WORD, _OTHER_KIND = 1, (ROWS ^ ANSWER) << 8  # an answer's head is that of its rows, but for the kind
_LOOKS_AT_MEMORY = 16  # between two looks at the sockets


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
                memcpy(pointer(slot + r * row_bytes), pointer(rows), row_bytes)
        else:
            indices = carray(pointer(task[at + INDICES]), count, np.int64)
            for r in range(count):
                memcpy(pointer(slot + r * row_bytes), pointer(rows + indices[r] * row_bytes), row_bytes)
        number_at(task[at + STATE])[0] = LOOKED_AT
        sent = send(task[at + SOCKET], pointer(task[at + HEAD]), task[at + HEAD_SIZE], NO_WAIT | NO_SIGNAL)
        if sent < 0:
            sent = -error_number()  # type: ignore[no-untyped-call]
        if sent == task[at + HEAD_SIZE]:
            task[at + RESULT] = 0
        else:
            task[at + RESULT], task[OUTCOME] = sent, UNUSUAL


@kernel
def _stop_looking(task):  # type: ignore[no-untyped-def]
    """Have answers that have not come be told by a head: whether all have come."""
    all_came = True
    for part in range(task[NUMBER]):
        at = HEADER + FIELDS * part
        if task[at + RESULT] == 0:
            if exchange(number_at(task[at + STATE]), LOOKED_AT, 0) == ANSWERED:
                task[at + RESULT], task[at + CAME] = 1, now(task[CLOCK])  # type: ignore[no-untyped-call]
            else:
                all_came = False
        all_came = all_came and task[at + RESULT] == 1
    return all_came


@kernel
def _read_reply(task, at, flags):  # type: ignore[no-untyped-def]
    """Read the head of a part's answer: whether one has come, or is not to be waited for; RESULT says what it is."""
    head = carray(pointer(task[at + HEAD]), _WORDS, np.uint32)
    reply = carray(pointer(task[at + REPLY]), _WORDS, np.uint32)
    count = recv(task[at + SOCKET], pointer(task[at + REPLY]), HEAD_BYTES, flags)
    if count < 0:
        error = error_number()  # type: ignore[no-untyped-call]
        if error == AGAIN:
            return False
        task[at + RESULT] = -1000 - error
        return True
    same = count == HEAD_BYTES
    for word in range(_WORDS):
        same = same and reply[word] == (head[word] ^ (_OTHER_KIND if word == _KIND_WORD else 0))
    task[at + RESULT], task[at + CAME] = 1 if same else -1 - count, now(task[CLOCK])  # type: ignore[no-untyped-call]
    return True


@kernel
def _look(task, at_sockets):  # type: ignore[no-untyped-def]
    """One look for all answers that have not come, into memory, and at sockets as well: the outcome so far, or LATE."""
    outcome = ALL
    for part in range(task[NUMBER]):
        at = HEADER + FIELDS * part
        if task[at + RESULT] == 0:
            if seen(number_at(task[at + STATE])) == ANSWERED:
                task[at + RESULT], task[at + CAME] = 1, now(task[CLOCK])  # type: ignore[no-untyped-call]
            elif not (at_sockets and _read_reply(task, at, NO_WAIT)):  # type: ignore[no-untyped-call]
                outcome = LATE
                continue
        if task[at + RESULT] != 1:
            return UNUSUAL
    return outcome


@Routine
def take_replies(task):  # type: ignore[no-untyped-def]
    """Hear of each part's answer. OUTCOME is ALL, LATE or UNUSUAL; RESULT 1: it has come.

    Until SLEEP_AT (ns, monotonic) a thread looks, and gives its core away between two looks; then it sleeps as long as
    its sockets do. Of what is no answer to the part RESULT says -1 - its bytes, which lie at REPLY; -1: the end. -1000
    - errno: an error. Where not ALL have come, the others are told by heads from then on.
    """
    looks = 0
    while True:
        looks += 1
        outcome = _look(task, looks % _LOOKS_AT_MEMORY == 0)  # type: ignore[no-untyped-call]
        if outcome != LATE or now(task[CLOCK]) >= task[SLEEP_AT]:  # type: ignore[no-untyped-call]
            break
        sched_yield()
    if outcome != ALL and _stop_looking(task):  # type: ignore[no-untyped-call]
        outcome = ALL
    part = 0
    while outcome == LATE and part < task[NUMBER]:
        at = HEADER + FIELDS * part
        if task[at + RESULT] == 0 and not _read_reply(task, at, 0):  # type: ignore[no-untyped-call]
            break
        if task[at + RESULT] != 1:
            outcome = UNUSUAL
        part += 1
    task[OUTCOME] = ALL if outcome == LATE and part == task[NUMBER] else outcome


@Routine
def stop_looking(task):  # type: ignore[no-untyped-def]
    """Have answers that have not come be told by heads. OUTCOME is ALL where all have come, else LATE."""
    task[OUTCOME] = ALL if _stop_looking(task) else LATE  # type: ignore[no-untyped-call]


def load() -> None:
    """Compile them now, or read what was compiled."""
    if AVAILABLE:
        for routine in (post_rows, take_replies, stop_looking):
            routine.load()
