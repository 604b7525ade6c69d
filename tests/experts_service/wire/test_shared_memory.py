"""Memory that two processes map: what is safe to take from a peer, and that nothing of it stays behind."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import socket
import threading
from collections.abc import Callable

import pytest

from experts_service.wire.handshake import HandshakeRefused, ShardHandshake, introduce
from experts_service.wire.shared_memory import (
    DESCRIPTION,
    MAX_BYTES,
    NUM_SLOTS,
    ROWS_PER_SLOT,
    MemoryRefused,
    SharedMemory,
    accept,
    create,
    memory_bytes,
    receive,
)
from tests.memory import descriptors, mappings

SECRET, FINGERPRINT = b"s" * 32, "f" * 64
ROW_BYTES = 64
SIZE = memory_bytes(ROW_BYTES)
SLOT = ROW_BYTES * ROWS_PER_SLOT


def memfds() -> int:
    """Descriptors and mappings of such memory that this process has."""
    return mappings("manta-rows") + descriptors("manta-rows")


def offered(
    num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT, sent: Callable[[], list[int]] | None = None
) -> SharedMemory | BaseException | None:
    """What a coordinator makes of a shard that proves itself and then offers this."""
    ours, theirs = socket.socketpair()
    given = sent() if sent is not None else []

    def shard_side() -> None:
        side = ShardHandshake(SECRET, FINGERPRINT)
        theirs.sendall(side.receive(theirs.recv(side.wants, socket.MSG_WAITALL)))
        last = side.receive(theirs.recv(side.wants, socket.MSG_WAITALL))
        assert side.wants_memory
        data = [last, DESCRIPTION.pack(num_slots, slot_bytes)]
        socket.send_fds(theirs, data, given) if given else theirs.sendmsg(data)

    thread = threading.Thread(target=shard_side)
    thread.start()
    try:
        with ours, theirs:
            return introduce(ours, SECRET, FINGERPRINT, 60.0, memory=True)
    except (HandshakeRefused, OSError) as error:
        return error
    finally:
        thread.join(60)
        for descriptor in given:
            os.close(descriptor)


def memfd(size: int = SIZE, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) -> int:
    descriptor = os.memfd_create("manta-rows", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_both_ends_see_the_same_bytes_and_nothing_stays() -> None:
    before = memfds()
    shard, descriptor = create(ROW_BYTES)
    coordinator = offered(sent=lambda: [descriptor])
    assert isinstance(coordinator, SharedMemory)
    coordinator.requests[5], shard.answers[-1] = 17, 71
    assert (shard.requests[5], coordinator.answers[-1]) == (17, 71)
    assert len(shard.requests) == len(coordinator.answers) == NUM_SLOTS * SLOT
    assert memfds() > before
    del shard, coordinator
    assert memfds() == before


def test_a_shard_without_memory_says_so() -> None:
    assert offered(0, 0) is None


def test_a_tensor_of_memory_outlives_what_made_it() -> None:
    """A batch may still be computed when its connection is gone."""
    shard, descriptor = create(ROW_BYTES)
    os.close(descriptor)
    rows = shard.requests[:8]
    del shard
    rows.fill_(3)
    assert rows.sum() == 24


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (lambda: offered(), "0 descriptors"),
        (lambda: offered(sent=lambda: [memfd(seals=0)]), "not sealed"),
        (lambda: offered(sent=lambda: [memfd(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)]), "not sealed"),
        (lambda: offered(sent=lambda: [memfd(SIZE - mmap.PAGESIZE)]), "not of the size"),
        (lambda: offered(sent=lambda: [memfd(2 * SIZE)]), "not of the size"),
        (lambda: offered(sent=lambda: [os.open("/etc/hostname", os.O_RDONLY)]), "cannot be mapped"),
        (lambda: offered(num_slots=2**20, sent=lambda: [memfd()]), "slots of"),
        (lambda: offered(slot_bytes=MAX_BYTES, sent=lambda: [memfd()]), "slots of"),
        (lambda: offered(slot_bytes=0, sent=lambda: [memfd(0)]), "slots of"),
        (
            lambda: offered(
                sent=lambda: [
                    memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE)
                ]
            ),
            "cannot be mapped",
        ),
    ],
)
def test_memory_that_could_kill_whoever_touches_it_is_refused(
    offer: Callable[[], SharedMemory | BaseException | None], reason: str
) -> None:
    """A peer that truncates what we map has the kernel send us SIGBUS."""
    before = memfds()
    refused = offer()
    assert isinstance(refused, HandshakeRefused)
    assert reason in str(refused)
    assert memfds() == before


def test_of_many_descriptors_none_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert isinstance(offered(), HandshakeRefused)  # whatever a thread and a socket need is there by now
    many = offered(sent=lambda: [memfd() for _ in range(50)])
    assert isinstance(many, SharedMemory), "the first is as it should be"
    del many
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_coordinator_without_room_for_it_has_a_lane_all_the_same() -> None:
    """It refused the lane, each time it was dialled, and rows went through the object store."""
    shard, descriptor = create(ROW_BYTES)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # a mapping keeps a descriptor of its own
    try:
        assert accept(shard.description, [descriptor]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_memory_cannot_shrink_once_it_is_shared() -> None:
    _, descriptor = create(ROW_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 2 * SIZE)
    os.close(descriptor)


def test_too_much_for_one_connection_is_not_made() -> None:
    with pytest.raises(OSError, match="limit"):
        create(MAX_BYTES // NUM_SLOTS)


def test_a_descriptor_is_taken_with_its_bytes_or_closed() -> None:
    ours, theirs = socket.socketpair()
    shard, descriptor = create(ROW_BYTES)
    with ours, theirs:
        socket.send_fds(theirs, [b"x"], [descriptor])
        taken: list[int] = []
        assert receive(ours, 10, taken) == b"x"
        assert len(taken) == 1
        assert not os.get_inheritable(taken[0])
        with pytest.raises(MemoryRefused):
            accept(DESCRIPTION.pack(NUM_SLOTS, SLOT + 1), taken)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(taken[0])
    os.close(descriptor)
    del shard
