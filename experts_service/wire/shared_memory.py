"""Memory that both ends of a Unix-socket lane map: a memfd that the shard makes. Knows bytes; knows no frame.

    requests    slot 0 · slot 1 · …     the coordinator writes rows, the shard reads them
    answers     slot 0 · slot 1 · …     the shard writes answers, the coordinator reads them
    states      slot 0 · slot 1 · …     whether the coordinator looks here for the answer, and whether it is there

Between GPUs there may be the same slots on the shard's card as well (`device_slots`), with the same states.

The coordinator says LOOKED_AT before it asks. A shard that makes ANSWERED of it sends no head; any other shard, and any
shard that finds something else, does. A coordinator that makes nothing of it again, since it wants to sleep, finds the
answer there or is sent a head. So it hears of each answer in one way, whatever order things happen in.

A slot holds ROWS_PER_SLOT rows, in both halves at the same place. No file system has a name of it: it is gone with the
last process that maps it, however that one ends. Its size is sealed, so a peer that shrinks it cannot have the other
one killed for touching what is not there any more.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import mmap
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from struct import Struct

import torch

from experts_service.wire.device_slots import DeviceSlots

logger = logging.getLogger(__name__)

NUM_SLOTS, ROWS_PER_SLOT = 64, 32  # 2,048 rows in all, a prefill's; 256 KiB a slot for rows of 4096 in bf16
MAX_BYTES = 2**30
LOOKED_AT, ANSWERED = 1, 2  # states
STATE_BYTES = 64  # a cache line each
DESCRIPTION = Struct("<II")  # number of slots, bytes of one; both 0: there is no memory
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_DESCRIPTOR_BYTES = array.array("i").itemsize
_NO_ROOM = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # this process has no more; the memory is as it should be


class MemoryRefused(Exception):
    """What the peer gave cannot be mapped safely."""


def memory_bytes(row_bytes: int) -> int:
    """Of one connection's memory, for rows of so many bytes."""
    return _size(NUM_SLOTS, ROWS_PER_SLOT * row_bytes)


def _size(num_slots: int, slot_bytes: int) -> int:
    states = -(-num_slots * STATE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
    return 2 * num_slots * slot_bytes + states


class _Mapping(mmap.mmap):
    """Unmapped with its last reference, a tensor's, say."""

    before_unmapping: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.before_unmapping is not None:
            self.before_unmapping()


class SharedMemory:
    """One mapping. It lasts as long as something refers to it or to its tensors."""

    def __init__(self, descriptor: int, num_slots: int, slot_bytes: int) -> None:
        """Map `descriptor`, which stays the caller's. Raises OSError."""
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.description = DESCRIPTION.pack(num_slots, slot_bytes)  # for the other end
        self._mapping = memory = _Mapping(descriptor, _size(num_slots, slot_bytes))
        with suppress(OSError):
            memory.madvise(mmap.MADV_DONTFORK)  # a child of this process has nothing to do with it
        slots, whole = num_slots * slot_bytes, torch.frombuffer(memory, dtype=torch.uint8)
        self.requests, self.answers = whole[:slots], whole[slots : 2 * slots]  # uint8
        self.states = whole[2 * slots :][: num_slots * STATE_BYTES]  # uint8
        self.in_device: DeviceSlots | None = None

    def pin(self, pin: Callable[[torch.Tensor], Callable[[], object] | None]) -> bool:
        """Have `pin` prepare all of it for a device, and undo that before it is unmapped. Whether it could."""
        undo = pin(torch.frombuffer(self._mapping, dtype=torch.uint8))
        self._mapping.before_unmapping = undo
        return undo is not None


def create(row_bytes: int) -> tuple[SharedMemory, int]:
    """New memory for rows of so many bytes, and the descriptor to send. Raises OSError where that cannot be had.

    All of it is reserved now: a process that touched what cannot be had any more would be killed.
    """
    slot_bytes = ROWS_PER_SLOT * row_bytes
    if memory_bytes(row_bytes) > MAX_BYTES:
        raise OSError(f"{memory_bytes(row_bytes)} bytes for one connection; the limit is {MAX_BYTES}")
    descriptor = os.memfd_create("manta-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, memory_bytes(row_bytes))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return SharedMemory(descriptor, NUM_SLOTS, slot_bytes), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def accept(description: bytes, descriptors: list[int], device: torch.device | None = None) -> SharedMemory | None:
    """What a shard gave: None where it gave none, or where we have no room for it. Closes the descriptors.

    `device`: for whose memory it was asked as well, which a second descriptor is of. Raises MemoryRefused.
    """
    try:
        num_slots, slot_bytes = DESCRIPTION.unpack(description)
        if not num_slots:
            return None
        size = _size(num_slots, slot_bytes)
        most = 1 if device is None else 2
        if not 1 <= len(descriptors) <= most or not slot_bytes or not size <= MAX_BYTES or num_slots > NUM_SLOTS:
            raise MemoryRefused(f"{num_slots} slots of {slot_bytes} bytes, {len(descriptors)} descriptors")
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
        if seals & _SEALS != _SEALS or os.fstat(descriptors[0]).st_size != size:
            raise MemoryRefused("its memory is not of the size that it says, or not sealed")
        if os.fstatvfs(descriptors[0]).f_bsize != mmap.PAGESIZE:
            raise MemoryRefused("its memory is of huge pages, of which there may be none left when it is touched")
        memory = SharedMemory(descriptors[0], num_slots, slot_bytes)
        if device is not None and len(descriptors) == 2:
            _open_in_device(memory, descriptors[1], device)
        return memory
    except OSError as error:
        if error.errno in _NO_ROOM:
            logger.warning("rows for a shard on this node are sent, not shared: its memory cannot be mapped: %s", error)
            return None
        raise MemoryRefused(f"its memory cannot be mapped: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _open_in_device(memory: SharedMemory, descriptor: int, device: torch.device) -> None:
    """Slots on the shard's card as well, where they can be used from here."""
    try:
        memory.in_device = DeviceSlots.open(descriptor, memory.answers, device)
    except RuntimeError as error:  # of a device that is gone, too: what is computed there next says so
        logger.warning("rows for a shard on this node lie in the host's memory, not in its GPU's: %s", str(error))


def receive(channel: socket.socket, count: int, descriptors: list[int], *, most: int = 1) -> bytes:
    """At most `count` bytes, and `most` descriptors that came with them."""
    data, ancillary, *_ = channel.recvmsg(count, socket.CMSG_LEN(most * _DESCRIPTOR_BYTES), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.extend(array.array("i", content[: len(content) // _DESCRIPTOR_BYTES * _DESCRIPTOR_BYTES]))
    return data
