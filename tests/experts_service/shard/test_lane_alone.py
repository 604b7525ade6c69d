"""Rows in slots that come alone are run as they are read, by Python or without it: what their heads may say, and what
becomes of the unusual.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from experts_service.carriers.dialer import Dialled
from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.jit import AVAILABLE, pointer, take
from experts_service.kernels.compiled.routine import Routine, Task
from experts_service.kernels.swiglu import Prepared
from experts_service.shard import serve_kernel
from experts_service.wire import handshake
from experts_service.wire.frame import ANSWER, DRAINING, ERROR, FAILED, HEAD_BYTES, RowsFormat, answer_head, read_reply
from experts_service.wire.shared_memory import ANSWERED, LOOKED_AT, ROWS_PER_SLOT, STATE_BYTES
from tests.experts_service import lanes
from tests.experts_service.lanes import GROUPS, HIDDEN, LONG_S, NUM_LAYERS, Shards, shards
from tests.waiting import wait_for

if AVAILABLE:
    from numba import carray

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="nothing is compiled")

ROW_BYTES = 4 * HIDDEN
DEADLINE_MS = 60_000


def maths(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """As `scale` does it."""
    assert rows[0, 0] != 13.0, "it raises"
    pieces = zip(rows.split(list(counts)), GROUPS[0].experts, strict=True)
    return torch.cat([piece * (expert + 2) + layer for piece, expert in pieces])


@Routine
def scale(task):  # type: ignore[no-untyped-def]
    """One item: rows of each job times its factor, and more."""
    if take(task) > 0:
        return
    jobs = carray(pointer(task[1]), (task[2], 4), np.int64)
    rows = carray(pointer(task[3]), (task[5], task[6]), np.float32)
    answers = carray(pointer(task[4]), (task[5], task[6]), np.float32)
    for job in range(task[2]):
        factor, more = np.float32(jobs[job, 0]), np.float32(jobs[job, 1])
        for row in range(jobs[job, 2], jobs[job, 2] + jobs[job, 3]):
            for i in range(task[6]):
                answers[row, i] = rows[row, i] * factor + more


def prepare(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared:
    table = torch.tensor([(expert + 2, layer, 0, 0) for expert in GROUPS[0].experts])
    jobs = torch.zeros(sum(map(bool, counts)), 4, dtype=torch.int64)
    task = Task(scale, 1, (jobs.data_ptr(), len(jobs), rows.data_ptr(), answers.data_ptr(), *rows.shape))
    return Prepared(Chain([task]), (table,), (jobs,))


@dataclass
class Peer:
    """A coordinator that says what the test has it say."""

    running: Shards
    dialled: Dialled
    calls: list[int] = field(default_factory=list)

    def ask(
        self,
        number: int,
        layer: int = 0,
        counts: tuple[int, int] = (1, 2),
        slot: int = 1,
        deadline_ms: int = DEADLINE_MS,
    ) -> bytes:
        """Send a head; its rows are `number` throughout."""
        rows, memory = sum(counts), self.dialled.memory
        assert memory is not None
        start = (slot - 1) * ROWS_PER_SLOT * ROW_BYTES
        memory.requests[start : start + rows * ROW_BYTES].view(torch.float32)[:] = number
        head = RowsFormat(2).pack(torch.float32, number, 9, layer, 1, rows, HIDDEN, deadline_ms, counts, slot)
        self.dialled.channel.sendall(head)
        return head

    def reply(self) -> bytes:
        return self.dialled.channel.recv(HEAD_BYTES, socket.MSG_WAITALL)

    def answered(self, number: int, layer: int = 0, counts: tuple[int, int] = (1, 2), slot: int = 1) -> None:
        """The answer lies in its slot."""
        assert self.reply() == answer_head(RowsFormat(2).pack(
            torch.float32, number, 9, layer, 1, sum(counts), HIDDEN, DEADLINE_MS, counts, slot
        ))  # fmt: skip
        memory = self.dialled.memory
        assert memory is not None
        start = (slot - 1) * ROWS_PER_SLOT * ROW_BYTES
        answer = memory.answers[start : start + sum(counts) * ROW_BYTES].view(torch.float32).view(-1, HIDDEN)
        asked = torch.full((sum(counts), HIDDEN), float(number))
        assert torch.equal(answer, maths(layer, asked, counts))

    def state(self, slot: int = 1) -> Tensor:
        memory = self.dialled.memory
        assert memory is not None
        return memory.states.view(torch.int64)[(slot - 1) * STATE_BYTES // 8]

    @property
    def in_chains(self) -> int:
        """Frames that were run without Python."""
        return self.running.servers["0a"].stats().compiled.frames


def dialled(running: Shards) -> Dialled:
    transport = running.transport()
    replica = running.table.replicas(transport.deployments[0])[0]
    made = transport.routes._links._dialer(replica, 5.0)
    made.channel.settimeout(LONG_S)
    return made


@pytest.fixture(params=["python", "chains"])
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(lanes, "MEMORY", True)
    scale.load()  # no answer waits for it
    with shards() as running:
        running.start("0a", 0, maths, prepare=prepare if request.param == "chains" else None)
        running.start("1a", 1)
        first = dialled(running)
        yield Peer(running, first)
        first.channel.close()


with_chains = pytest.mark.parametrize("peer", ["chains"], indirect=True)


def test_what_was_checked_once_is_no_licence_for_what_differs(peer: Peer) -> None:
    """Heads that say the same of their rows are looked at once: all that is left out of that may differ."""
    for number in range(3):
        for layer in range(NUM_LAYERS):
            peer.ask(number, layer)
            peer.answered(number, layer)
    for counts, slot in (((2, 1), 1), ((1, 2), 5), ((0, 3), 64), ((3, 0), 1), ((20, 30), 2)):
        peer.ask(7, 1, counts, slot)
        peer.answered(7, 1, counts, slot)
    peer.ask(1, NUM_LAYERS)
    assert peer.reply() == b"", "there is no such layer"


@pytest.mark.parametrize("at", [0, 4, 5, 6, 7, 28, 32, 40])
def test_a_byte_that_differs_from_what_was_checked_closes_the_lane(peer: Peer, at: int) -> None:
    head = bytearray(peer.ask(3))
    peer.answered(3)
    head[at] ^= 0x11
    peer.dialled.channel.sendall(head)
    assert peer.reply() == b""


@pytest.mark.parametrize("peer", ["python"], indirect=True)
def test_an_error_of_the_maths_is_told_and_the_next_rows_are_run(peer: Peer) -> None:
    for number in (1, *[13] * 20, 2):
        peer.ask(number)
        if number != 13:
            peer.answered(number)
            continue
        reply = read_reply(peer.reply())
        assert (reply.kind, reply.flags, reply.request_id) == (ERROR, FAILED, 13)
        assert b"it raises" in peer.dialled.channel.recv(reply.payload_bytes, socket.MSG_WAITALL)


@with_chains
def test_where_there_is_no_room_to_run_rows_without_python_they_are_run_all_the_same(peer: Peer) -> None:
    """The thread of all lanes ended, and who had asked was not answered."""

    def no_room(*_: object) -> Prepared:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    server = peer.running.servers["0a"]
    server._prepare, given = no_room, server._prepare
    for number in range(3):
        peer.ask(number)
        peer.answered(number)
    assert peer.in_chains == 0
    server._prepare = given
    number = 0
    while not peer.in_chains:  # a head that comes beside other news is run by Python, and its like not known then
        number += 1
        assert number < 1000, "there is room again"
        peer.ask(number)
        peer.answered(number)


@with_chains
def test_rows_are_run_without_python_once_their_like_has_been(peer: Peer) -> None:
    """Which expert has them, and of which attempt they are, makes no difference; each expert's are counted."""
    for number, counts in enumerate([(1, 0), (0, 1), (0, 1), (2, 3), (4, 1), (3, 2)]):
        peer.ask(number, 1, counts)
        peer.answered(number, 1, counts)
    assert peer.in_chains == 4
    assert peer.running.servers["0a"].stats().compiled.rows == (7, 5)
    assert peer.running.servers["0a"].stats().rows == 18


@with_chains
def test_numbers_that_do_not_add_up_close_the_lane_though_their_like_is_known(peer: Peer) -> None:
    head = bytearray(peer.ask(3))
    peer.answered(3)
    head[HEAD_BYTES] += 1
    peer.dialled.channel.sendall(head)
    assert peer.reply() == b""


@with_chains
def test_who_looks_for_an_answer_is_sent_no_head(peer: Peer) -> None:
    for number in range(3):
        peer.ask(number)
        peer.answered(number)
    for number in range(3, 6):
        peer.state().fill_(LOOKED_AT)
        peer.ask(number)
        wait_for(lambda: int(peer.state()) == ANSWERED, LONG_S, "the answer")
    peer.state().fill_(0)
    peer.ask(6)
    peer.answered(6)


@with_chains
def test_heads_in_pieces_and_two_at_once_are_read_as_others_are(peer: Peer) -> None:
    number = 20
    for cut in (0, 1, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 3):
        for _ in range(2):
            peer.ask(number)
            peer.answered(number)
            number += 1
        head = RowsFormat(2).pack(torch.float32, number, 9, 0, 1, 3, HIDDEN, DEADLINE_MS, (1, 2), 1)
        peer.dialled.channel.sendall(head[:cut])
        wait_for(lambda: not unread(peer), LONG_S, "what has come to be read")
        peer.dialled.channel.sendall(head[cut:] + head)
        for _ in range(2):
            assert peer.reply() == answer_head(head)
        number += 1


@with_chains
def test_of_two_heads_at_once_each_is_known_by_its_own(peer: Peer) -> None:
    """What follows a head is read with it: rows of one were then believed to be like those of another."""
    form = RowsFormat(2)
    peer.ask(20, 1, (3, 0), slot=9)
    peer.answered(20, 1, (3, 0), slot=9)
    for number, layer, counts, slot in ((21, 0, (1, 2), 1), (22, 0, (1, 2), 1), (23, 1, (3, 0), 9), (24, 1, (0, 3), 9)):
        peer.ask(number, layer, counts, slot=slot)
        peer.answered(number, layer, counts, slot=slot)
        head = form.pack(torch.float32, number, 9, 2, 1, 2, HIDDEN, DEADLINE_MS, (1, 1), 3)
        peer.dialled.channel.sendall(head + head[:9])
        assert peer.reply() == answer_head(head)
        peer.dialled.channel.sendall(head[9:])
        assert peer.reply() == answer_head(head)


def unread(peer: Peer) -> int:
    """Bytes that the shard has not read."""
    room = bytearray(4)
    fcntl.ioctl(peer.dialled.channel, termios.TIOCOUTQ, room)
    return int.from_bytes(room, sys.byteorder)


@with_chains
def test_two_coordinators_whose_rows_are_known_are_both_answered(peer: Peer) -> None:
    second = Peer(peer.running, dialled(peer.running))
    for number in range(20, 70):
        for one in (peer, second):
            one.ask(number)
        for one in (peer, second):
            one.answered(number)
    second.dialled.channel.close()
    for number in range(3):
        peer.ask(number)
        peer.answered(number)
    assert peer.in_chains > 0


@with_chains
def test_a_shard_that_is_never_idle_sees_to_what_is_due(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says nothing was not refused while somebody else kept asking."""
    monkeypatch.setattr(handshake, "TIMEOUT_S", 2.0)  # nobody else pauses for so long
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(peer.running.servers["0a"].path))
        stranger.setblocking(False)
        deadline, number, is_refused = time.monotonic() + LONG_S, 20, False
        while not is_refused and time.monotonic() < deadline:
            peer.ask(number)
            peer.answered(number)
            number += 1
            with suppress(BlockingIOError):
                is_refused = stranger.recv(1) == b""
            time.sleep(0.02)
    assert is_refused
    assert peer.in_chains > 0


@with_chains
def test_what_is_known_is_forgotten_when_it_is_too_much(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_kernel, "MOST_KNOWN", 4)
    for number in range(20, 60):
        peer.ask(number, slot=1 + number // 2 % 5)
        peer.answered(number, slot=1 + number // 2 % 5)
    assert 0 < peer.in_chains < 40


def test_rows_that_are_late_or_come_to_a_shard_that_drains_are_not_run(peer: Peer) -> None:
    peer.ask(1)
    peer.answered(1)
    peer.ask(2, deadline_ms=0)
    reply = read_reply(peer.reply())
    assert reply.kind == ERROR
    peer.dialled.channel.recv(reply.payload_bytes, socket.MSG_WAITALL)
    assert peer.running.servers["0a"].drain(LONG_S)
    peer.ask(3)
    assert read_reply(peer.reply()).kind == DRAINING


def test_answers_that_the_peer_has_no_room_for_come_when_it_reads(peer: Peer) -> None:
    server = peer.running.servers["0a"]
    wait_for(lambda: bool(server._connections), LONG_S, "the shard to know its peer")
    [connection] = server._connections.values()
    connection.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    number = 0
    while not connection.wants_to_write:
        number += 1
        peer.ask(number)
        before = number
        wait_for(lambda: server.stats().frames >= before, LONG_S, "the rows to be run")  # noqa: B023
        assert number < 1000
    number += 1
    peer.ask(number)
    for expected in range(1, number + 1):
        reply = read_reply(peer.reply())
        assert (reply.kind, reply.request_id) == (ANSWER, expected)
    peer.ask(0)
    peer.answered(0)
