"""Rows in memory that coordinator and shard both map: the bits of rows that are sent, and what a peer can do to it."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experts_service.carriers.link import NOBODY, NOTHING, LaneAttempt, Link, LinkLost
from experts_service.delivery.delivery import ANSWERED, POSTED
from experts_service.shard import server as shard_server
from experts_service.wire.frame import HEAD_BYTES, RowsFormat, answer_head
from experts_service.wire.shared_memory import NUM_SLOTS, ROWS_PER_SLOT, SharedMemory, create, memory_bytes
from router_service.dispatcher import Dispatcher
from tests import memory
from tests.experts_service.lanes import (
    GROUPS,
    HIDDEN,
    LONG_S,
    NUM_LAYERS,
    Shards,
    ask,
    batch,
    expected,
    maths,
    shards,
    stopped_in_layer_2,
)
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

ROW_BYTES = HIDDEN * 4


pytestmark = pytest.mark.usefixtures("memory")


def mappings(process: int | str = "self") -> int:
    """How many such memories a process maps."""
    return memory.mappings("manta-rows", process)


def descriptors() -> int:
    """How many this one has open."""
    return memory.descriptors("manta-rows")


def test_rows_lie_in_memory_until_they_are_too_many_for_it() -> None:
    with shards() as running:
        remote = running.both()
        for num_rows, in_memory in ((1, True), (31, True), (500, True), (NUM_SLOTS * ROWS_PER_SLOT + 1, False)):
            rows = batch(num_rows)[0]
            experts = torch.tensor(GROUPS[0].experts).repeat(num_rows, 1)[:, :1]
            before = running.servers["0a"].stats()
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts)), num_rows
            after = running.servers["0a"].stats()
            assert (after.frames - before.frames, after.in_memory - before.in_memory) == (1, in_memory)
        assert mappings() == 4, "each end maps the memory of two lanes"
    assert (mappings(), descriptors()) == (0, 0)


def test_more_dispatches_under_way_than_there_is_room_for_are_sent() -> None:
    opened = threading.Event()

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert opened.wait(LONG_S)
        return maths(GROUPS[0].experts)(layer, rows, counts)

    with shards() as running:
        running.start("0a", 0, run)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport())
        batches = [batch(700, seed=seed) for seed in range(8)]
        flights = [remote.dispatch(1, rows, experts) for rows, experts in batches]
        opened.set()
        for flight, (rows, experts) in zip(flights, batches, strict=True):
            assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
        stats = running.servers["0a"].stats()
        assert stats.frames == 8
        assert 1 < stats.in_memory < 8
        assert not any(len(link.memory.slots) for link in running.links() if link.memory)


def test_a_late_answer_is_written_where_nobody_else_has_rows() -> None:
    """Slots of a dispatch that nobody waits for stay its own: the shard may still be about to write there."""
    run, entered, opened = stopped_in_layer_2()
    with shards() as running:
        running.start("0a", 0, run)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport())
        late, experts = batch(40, seed=1)
        ask(remote, late, experts)
        dropped = remote.dispatch(2, late, experts)
        assert entered.wait(LONG_S)
        dropped.close()
        memory = next(link.memory for link in running.links() if len(link.forgotten) == 1)
        assert memory is not None
        assert len(memory.slots) == 1
        rows, experts = batch(40, seed=2)
        flight = remote.dispatch(1, rows, experts)  # waits behind the late one, in the same memory
        assert len(memory.slots) == 2
        opened.set()
        assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
        assert len(memory.slots) == 0


def test_two_coordinators_have_a_memory_each() -> None:
    with shards() as running:
        first = running.both()
        second = Dispatcher(GROUPS, running.transport())
        batches = [batch(50, seed=1), batch(50, seed=2)]
        for _ in range(3):
            flights = [one.dispatch(1, *two) for one, two in zip((first, second), batches, strict=True)]
            for one, flight, (rows, experts) in zip((first, second), flights, batches, strict=True):
                weights = torch.full(experts.shape, 0.5)
                assert torch.equal(one.combine(flight, weights), expected(rows, experts))
        assert mappings() == 8
        second.close()
        wait_for(lambda: mappings() == 4, LONG_S, "the memory of who left to go")
        assert torch.equal(ask(first, *batches[0]), expected(*batches[0]))


def test_a_machine_that_has_no_memory_to_give_sends_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shard_server, "create", refuse)
    with shards() as running:
        remote = running.both()
        rows, experts = batch(30)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert [server.stats().in_memory for server in running.servers.values()] == [0, 0]


@pytest.mark.parametrize("can_pin", [True, False])
def test_memory_of_a_shard_on_a_gpu_is_the_gpus_as_well_until_it_is_unmapped(
    monkeypatch: pytest.MonkeyPatch, can_pin: bool
) -> None:
    """The driver would read and write it after it is gone; where it cannot, rows are sent as between machines."""
    known: list[range] = []

    def pin(whole: Tensor) -> Callable[[], None] | None:
        place = range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
        known.append(place)

        def undo() -> None:
            assert any(
                line.startswith(f"{place.start:x}-") for line in Path("/proc/self/maps").read_text().splitlines()
            )
            known.remove(place)

        return undo if can_pin else None

    monkeypatch.setattr(shard_server, "pin", pin)
    with shards() as running:
        server = running.start("0a", 0)
        server._for_gpu = True
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(40)[0], torch.tensor(GROUPS[0].experts).repeat(40, 1)[:, :1]
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert server.stats().in_memory == can_pin
        assert [len(place) for place in known] == [memory_bytes(ROW_BYTES)]
        assert mappings() == (2 if can_pin else 0)
    assert (mappings(), known) == (0, [] if can_pin else known[:1])


def test_coordinators_beyond_a_bound_have_their_rows_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "MAX_MEMORIES", 1)
    with shards() as running:
        first = running.both()
        rows, experts = batch(30)
        ask(first, rows, experts)
        second = Dispatcher(GROUPS, running.transport())
        assert torch.equal(ask(second, rows, experts), expected(rows, experts))
        assert [server.stats().in_memory for server in running.servers.values()] == [1, 1]
        assert [server.stats().frames for server in running.servers.values()] == [2, 2]


class ShardProcess:
    """A shard that can be killed."""

    def __init__(self, group: int) -> None:
        self.process = subprocess.Popen(
            program("experts_service.lane_shard", group),
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.path, self.port = "", 0

    def listens(self) -> None:
        self.path, port = self.line().split()
        self.port = int(port)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait(LONG_S)


@contextmanager
def processes(*names: str) -> Iterator[tuple[Shards, dict[str, ShardProcess]]]:
    """Shards by replica id in processes of their own; `running.servers` has group 1 here."""
    started: dict[str, ShardProcess] = {}
    with shards() as running:
        try:
            for name in names:
                started[name] = ShardProcess(int(name[0]))
            for name, shard in started.items():
                shard.listens()
                running.servers[name] = shard  # type: ignore[assignment]
            running.start("1a", 1)
            yield running, started
        finally:
            for shard in started.values():
                shard.close()


def test_shards_that_are_stopped_or_killed_over_their_rows_harm_no_answer_and_leave_nothing() -> None:
    """One that is stopped is given up; when it goes on, it answers into memory that the coordinator has left."""
    with processes("0a", "0b") as (running, started):
        remote = Dispatcher(GROUPS, running.transport(timeout_s=15.0))
        links = running.transports[0].routes._links
        batches = [batch(300, seed=seed) for seed in range(4)]
        wanted = [expected(*one) for one in batches]

        def all_are_right() -> bool:
            return all(torch.equal(ask(remote, *one), right) for one, right in zip(batches, wanted, strict=True))

        def both_are_connected() -> bool:
            return all_are_right() and all(links.get(name) for name in started)

        wait_for(both_are_connected, LONG_S, "both")
        for shard in started.values():
            os.kill(shard.process.pid, signal.SIGSTOP)
            assert all_are_right(), "the other one answers"
            os.kill(shard.process.pid, signal.SIGCONT)
            assert all_are_right()
            wait_for(both_are_connected, LONG_S, "both to be connected again")
        rows, experts = batches[0]
        flight = remote.dispatch(2, rows, experts)
        streams = {shard.process.stdout: shard for shard in started.values()}
        computing = streams[select.select(list(streams), [], [], LONG_S)[0][0]]
        assert computing.line() == "computing into memory", "half of its answer is where we would read it"
        (other,) = [shard for shard in started.values() if shard is not computing]
        for _ in range(2):  # it may have a part of the rows, and gets those of the other one
            other.go_on()
        computing.close()
        assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts, 2))
        assert all_are_right()
        assert mappings(other.process.pid) == 1
        assert mappings() == descriptors() == 3, "both ends of group 1's, and ours of the living one's"
        assert not list(Path("/dev/shm").glob("*manta-rows*"))


def test_a_coordinator_that_is_killed_leaves_nothing_in_the_shards() -> None:
    run, entered, opened = stopped_in_layer_2()
    with shards() as running:
        running.start("0a", 0, run)
        running.start("1a", 1)
        paths = [str(server.path) for server in running.servers.values()]
        child = subprocess.Popen(
            program("experts_service.lane_coordinator", *paths),
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert child.stdout is not None
            assert [child.stdout.readline().strip() for _ in range(2)] == ["right", "waiting"]
            assert entered.wait(LONG_S)
            assert mappings(child.pid) == 2
        finally:
            child.kill()
            child.wait(LONG_S)
            child.stdout.close()
        opened.set()
        wait_for(lambda: mappings() == descriptors() == 0, LONG_S, "the memory of who was killed to go")
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(30)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))


def pair(num_attempts: int) -> tuple[Link, list[LaneAttempt], list[bytes], SharedMemory, socket.socket, bytearray]:
    """A link that was asked for rows in slots, what it sent, the shard's memory, its end, and where answers belong."""
    ours, theirs = socket.socketpair()
    memory, descriptor = create(ROW_BYTES)
    link = Link(ours, 0, SharedMemory(descriptor, memory.num_slots, memory.slot_bytes))
    os.close(descriptor)
    form, attempts, heads = RowsFormat(2), [], []
    places = bytearray(b"\xaa" * ROW_BYTES * 10 * num_attempts)
    host = np.arange(10 * ROW_BYTES, dtype=np.uint64).astype(np.uint8).reshape(10, ROW_BYTES)
    assert link.memory is not None
    for number in range(num_attempts):
        place = memoryview(places)[number * 10 * ROW_BYTES :][: 9 * ROW_BYTES]  # a row stays between two answers
        attempt = LaneAttempt(NOBODY, 5, number + 1, place)
        attempt.slot, attempt.follows = (
            link.memory.write(number + 1, host.data.cast("B"), ROW_BYTES, np.arange(9)),
            NOTHING,
        )
        head = form.pack(torch.float32, number + 1, 5, 0, 1, 9, HIDDEN, 1000, (4, 5), attempt.slot)
        attempt.expected = answer_head(head)
        link.send(attempt, head)
        attempts.append(attempt)
        heads.append(head)
    return link, attempts, heads, memory, theirs, places


def replies(random_: random.Random, heads: Sequence[bytes]) -> bytes:
    """What a hostile shard may say: right heads, stale ones, damaged ones, and noise."""
    said = b""
    for _ in range(random_.randint(1, 6)):
        reply = bytearray(answer_head(random_.choice(heads)))
        match random_.randrange(6):
            case 0 | 1:
                pass
            case 2:
                reply[random_.randrange(HEAD_BYTES)] = random_.randrange(256)
            case 3:
                reply[34:36] = random_.randrange(2**16).to_bytes(2, "little")  # another slot
            case 4:
                reply[24:28] = reply[40:44] = random_.randrange(2**32).to_bytes(4, "little")  # of any size
            case 5:
                reply = bytearray(random_.randbytes(random_.randint(1, 100)))
        said += reply
    return said


@pytest.mark.parametrize("num_cases", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_hostile_shard_changes_nothing_but_its_answers(num_cases: int) -> None:
    """Whatever it says and writes, an attempt has its own slot's bytes or none, and nothing is written beside them."""
    nobody, answered = LaneAttempt(NOBODY, 0, 0, NOTHING), 0
    for seed in range(num_cases):
        random_ = random.Random(seed)
        link, attempts, heads, memory, shard, places = pair(3)
        memory.answers.copy_(torch.frombuffer(bytearray(random_.randbytes(len(memory.answers))), dtype=torch.uint8))
        with shard:
            shard.sendall(replies(random_, heads))
            shard.shutdown(socket.SHUT_WR)
            try:
                while True:
                    waited_for = [attempt for attempt in attempts if attempt.state is POSTED] or [nobody]
                    link.receive(random_.choice(waited_for), socket.MSG_DONTWAIT)
            except (LinkLost, BlockingIOError):
                pass
        for number, attempt in enumerate(attempts):
            place = bytes(places[number * 10 * ROW_BYTES :][: 10 * ROW_BYTES])
            slot = memory.answers[number * memory.slot_bytes :][: 9 * ROW_BYTES].numpy().tobytes()
            answered += attempt.state is ANSWERED
            expected_bytes = slot if attempt.state is ANSWERED else b"\xaa" * 9 * ROW_BYTES
            assert place == expected_bytes + b"\xaa" * ROW_BYTES
            assert attempt.state is not POSTED, "the link was lost"
        link.close()
    assert answered > num_cases / 4, "not all were lost"


@pytest.mark.parametrize("num_cases", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_hostile_coordinator_harms_nobody(num_cases: int) -> None:
    """It may name any slots and write over its rows while they are run; the shard reads nothing beside its memory."""
    random_ = random.Random(7)
    with shards() as running:
        remote = running.both()
        rows, experts = batch(9)
        transport = running.transport()
        replica = running.table.replicas(transport.deployments[0])[0]
        form, asked = RowsFormat(2), 0
        dialled = transport.routes._links._dialer(replica, 5.0)
        for number in range(num_cases):
            count = random_.choice((1, 2, 31, 33, 2000, 2049))
            first, slot = random_.randint(0, count), random_.choice((0, 1, 2, 63, 64, 65, random_.randrange(2**16)))
            head = form.pack(
                torch.float32, number, 0, random_.randrange(NUM_LAYERS), 1, count, HIDDEN, 1000,
                (first, count - first), slot,
            )  # fmt: skip
            try:
                memory = dialled.memory
                assert memory is not None
                at = random_.randrange(len(memory.requests))
                memory.requests[at : at + 999] = random_.randrange(256)  # NaN and infinity among them
                memory.answers[at : at + 999] = random_.randrange(256)
                memory.states[random_.randrange(len(memory.states))] = random_.randrange(256)
                dialled.channel.setblocking(False)
                asked += dialled.channel.send(head) == len(head)
                if slot == 0 or random_.random() < 0.05:
                    raise OSError  # its rows never come
                dialled.channel.recv(1 << 16)
            except BlockingIOError:
                pass
            except OSError:
                dialled.channel.close()
                dialled = transport.routes._links._dialer(replica, 5.0)
            if number % 50 == 0:
                assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        dialled.channel.close()
        del dialled, memory
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert running.dialled.count("1a") == 1, "the good coordinator kept its connections"
        assert asked > num_cases / 2
        stats = running.servers["0a"].stats()
        assert stats.refused > num_cases / 20
        assert stats.in_memory > num_cases / 20
        wait_for(lambda: mappings() == 4, LONG_S, "the memory of who was refused to go")
