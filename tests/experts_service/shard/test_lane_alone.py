"""Rows in slots that come alone are run as they are read: what their heads may say, and what becomes of the unusual."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from experts_service.carriers.dialer import Dialled
from experts_service.wire.frame import ANSWER, DRAINING, ERROR, FAILED, HEAD_BYTES, RowsFormat, answer_head, read_reply
from experts_service.wire.shared_memory import ROWS_PER_SLOT
from tests.experts_service import lanes
from tests.experts_service.lanes import GROUPS, HIDDEN, NUM_LAYERS, Shards, maths, shards
from tests.waiting import wait_for

ROW_BYTES = 4 * HIDDEN


@dataclass
class Peer:
    """A coordinator that says what the test has it say."""

    running: Shards
    dialled: Dialled
    calls: list[int] = field(default_factory=list)

    def ask(
        self, number: int, layer: int = 0, counts: tuple[int, int] = (1, 2), slot: int = 1, deadline_ms: int = 5000
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
            torch.float32, number, 9, layer, 1, sum(counts), HIDDEN, 5000, counts, slot
        ))  # fmt: skip
        memory = self.dialled.memory
        assert memory is not None
        start = (slot - 1) * ROWS_PER_SLOT * ROW_BYTES
        answer = memory.answers[start : start + sum(counts) * ROW_BYTES].view(torch.float32).view(-1, HIDDEN)
        asked = torch.full((sum(counts), HIDDEN), float(number))
        assert torch.equal(answer, maths(GROUPS[0].experts)(layer, asked, counts))


@pytest.fixture
def peer() -> Iterator[Peer]:
    lanes_had = lanes.MEMORY
    lanes.MEMORY = True
    try:
        with shards() as running:

            def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
                assert rows[0, 0] != 13.0, "it raises"
                return maths(GROUPS[0].experts)(layer, rows, counts)

            running.start("0a", 0, run)
            running.start("1a", 1)
            transport = running.transport()
            replica = running.table.replicas(transport.deployments[0])[0]
            dialled = transport.routes._links._dialer(replica, 5.0)
            dialled.channel.settimeout(5.0)
            yield Peer(running, dialled)
            dialled.channel.close()
    finally:
        lanes.MEMORY = lanes_had


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


def test_an_error_of_the_maths_is_told_and_the_next_rows_are_run(peer: Peer) -> None:
    for number in (1, *[13] * 20, 2):
        peer.ask(number)
        if number != 13:
            peer.answered(number)
            continue
        reply = read_reply(peer.reply())
        assert (reply.kind, reply.flags, reply.request_id) == (ERROR, FAILED, 13)
        assert b"it raises" in peer.dialled.channel.recv(reply.payload_bytes, socket.MSG_WAITALL)


def test_rows_that_are_late_or_come_to_a_shard_that_drains_are_not_run(peer: Peer) -> None:
    peer.ask(1)
    peer.answered(1)
    peer.ask(2, deadline_ms=0)
    reply = read_reply(peer.reply())
    assert reply.kind == ERROR
    peer.dialled.channel.recv(reply.payload_bytes, socket.MSG_WAITALL)
    assert peer.running.servers["0a"].drain(5.0)
    peer.ask(3)
    assert read_reply(peer.reply()).kind == DRAINING


def test_answers_that_the_peer_has_no_room_for_come_when_it_reads(peer: Peer) -> None:
    server = peer.running.servers["0a"]
    wait_for(lambda: bool(server._connections), 5, "the shard to know its peer")
    [connection] = server._connections.values()
    connection.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    number = 0
    while not connection.wants_to_write:
        number += 1
        peer.ask(number)
        before = number
        wait_for(lambda: server.stats().frames >= before, 5, "the rows to be run")  # noqa: B023
        assert number < 1000
    number += 1
    peer.ask(number)
    for expected in range(1, number + 1):
        reply = read_reply(peer.reply())
        assert (reply.kind, reply.request_id) == (ANSWER, expected)
    peer.ask(0)
    peer.answered(0)
