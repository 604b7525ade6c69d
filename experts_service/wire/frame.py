"""The lane's wire format: a fixed head, counts per expert, raw tensor bytes. Knows no socket and no maths.

    rows       head [44] · counts [4 · E] · rows [R, D]       coordinator → shard, E experts of the group
    answer     head [44] · rows [R, D]                        shard → coordinator
    error      head [44] · a sentence in UTF-8                shard → coordinator, `flags` says of which kind
    draining   head [44]                                      shard → coordinator: not run, ask another replica

Where both ends map the same memory, a head may name a slot of it: the rows of frame and answer lie there, and only the
head and its counts are sent. `flags` of such rows, and of their answer, say whether it is one of the shard's GPU.

A reply echoes the head of what it replies to, with another kind (an error also with its own flags and size): so one
comparison of 44 bytes tells that an answer is the one asked for, of this request id, epoch, layer and attempt, and of
the right shape and dtype. All integers are little-endian, and so are the rows: big-endian hosts are refused at import.
A deadline travels as the milliseconds that are left, because clocks of two nodes differ; it counts from when the shard
reads the frame, so time in a socket's buffer is not seen.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import NamedTuple

import torch

from experts_service.wire.shared_memory import ROWS_PER_SLOT

if sys.byteorder != "little":
    raise ImportError("lanes carry little-endian rows as they are in memory; use transport object_store on this host")

MAGIC = b"MNTA"
VERSION = 1
MAX_PAYLOAD_BYTES = 2**30  # four times what 16384 rows of 8192 in bf16 need
MAX_MESSAGE_BYTES = 512  # of an error's sentence
MAX_DEADLINE_MS = 2**32 - 1

ROWS, ANSWER, ERROR, DRAINING = 1, 2, 3, 4  # kinds
FAILED, LATE = 1, 2  # flags of an error: the maths raised; the deadline had passed before its turn
IN_DEVICE = 1  # of rows: their slot is in device memory
DTYPES = {torch.float32: 1, torch.bfloat16: 2}

_FIELDS = "<4sBBBBQIHHIIHHII"
_HEAD = Struct(_FIELDS)
HEAD_BYTES = _HEAD.size
_KIND, _FLAGS, _PAYLOAD = 5, 7, 40  # offsets in the head
_ANSWER_KIND = bytes([ANSWER])
_ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPES.items()}


class FrameError(Exception):
    """The bytes are not a frame that this side may receive; the connection they came on is closed."""


class LaneShape(NamedTuple):
    """What both ends of a lane agree on; a frame of another shape is refused."""

    num_layers: int
    num_experts: int  # E, of the group
    hidden: int  # D
    dtype: torch.dtype


class RowsHead(NamedTuple):
    """The head of a frame of rows, with its counts, as one struct."""

    magic: bytes
    version: int
    kind: int
    dtype: int
    flags: int
    request_id: int  # of the coordinator, one per message
    epoch: int  # of its routing table, modulo 2³²
    layer: int
    attempt: int
    rows: int  # R
    hidden: int
    num_experts: int
    slot: int  # 0: the rows follow; else they lie in the connection's memory, 1 being its slot 0
    deadline_ms: int  # left when it was sent
    payload_bytes: int
    counts: tuple[int, ...]  # rows of each expert; their sum is R


class RowsFormat:
    """Heads of frames of rows for one group: the number of its experts fixes their size."""

    def __init__(self, num_experts: int) -> None:
        self._struct = Struct(f"{_FIELDS}{num_experts}I")
        self._num_experts = num_experts
        self.head_bytes = self._struct.size

    def pack(
        self,
        dtype: torch.dtype,
        request_id: int,
        epoch: int,
        layer: int,
        attempt: int,
        rows: int,
        hidden: int,
        deadline_ms: int,
        counts: tuple[int, ...],
        slot: int = 0,
    ) -> bytes:
        """The head for `rows` rows; they follow as they are in memory, unless they lie in a `slot`.

        Raises FrameError past the size limit.
        """
        payload = rows * hidden * dtype.itemsize
        if payload > MAX_PAYLOAD_BYTES:
            raise FrameError(f"{payload} bytes of rows in one frame; the limit is {MAX_PAYLOAD_BYTES}")
        return self._struct.pack(
            MAGIC, VERSION, ROWS, DTYPES[dtype], 0, request_id, epoch & 0xFFFFFFFF, layer, attempt, rows, hidden,
            self._num_experts, slot, deadline_ms, payload, *counts,
        )  # fmt: skip

    def pack_into(
        self,
        buffer: bytearray,
        at: int,
        dtype: int,
        request_id: int,
        epoch: int,
        layer: int,
        rows: int,
        hidden: int,
        deadline_ms: int,
        counts: tuple[int, ...],
        slot: int,
        payload_bytes: int,
        flags: int = 0,
    ) -> None:
        """The head of a first attempt whose rows lie in a `slot`, at a place in `buffer`. `dtype`: of DTYPES."""
        self._struct.pack_into(
            buffer, at, MAGIC, VERSION, ROWS, dtype, flags, request_id, epoch & 0xFFFFFFFF, layer, 1, rows, hidden,
            self._num_experts, slot, deadline_ms, payload_bytes, *counts,
        )  # fmt: skip

    def counts(self, head: bytearray) -> tuple[int, ...]:
        """Rows of each expert, as a head says that was checked."""
        return self._struct.unpack_from(head)[15:]

    def read(self, head: bytearray, shape: LaneShape, num_slots: int = 0, *, in_device: bool = False) -> RowsHead:
        """The fields of a head, all checked against `shape` and the connection's slots. Raises FrameError.

        `in_device`: there are as many in device memory.
        """
        fields = self._struct.unpack_from(head)
        counts = fields[15:]
        rows, hidden, num_experts, slot, _, payload = fields[9:15]
        if (
            fields[:4] == (MAGIC, VERSION, ROWS, DTYPES[shape.dtype])
            and (fields[4] == 0 or (fields[4] == IN_DEVICE and in_device and slot > 0))
            and fields[7] < shape.num_layers
            and hidden == shape.hidden
            and num_experts == self._num_experts
            and (slot == 0 or (slot - 1) * ROWS_PER_SLOT + rows <= num_slots * ROWS_PER_SLOT)
            and rows == sum(counts) > 0
            and payload == rows * hidden * shape.dtype.itemsize <= MAX_PAYLOAD_BYTES
        ):
            return RowsHead._make((*fields[:15], counts))
        raise FrameError(_complaint(RowsHead._make((*fields[:15], counts)), shape))


class ReplyHead(NamedTuple):
    """What a coordinator reads of a reply that is not simply the answer it waits for."""

    kind: int
    flags: int
    request_id: int
    payload_bytes: int  # that follow


def answer_head(asked: bytes | bytearray) -> bytes:
    """The head of the answer to the frame that starts with `asked`."""
    return bytes(asked[:_KIND]) + _ANSWER_KIND + bytes(asked[_KIND + 1 : HEAD_BYTES])


def refusal_head(asked: bytes | bytearray, kind: int, flags: int, payload_bytes: int) -> bytes:
    """The head of an error or of `draining`."""
    head = bytearray(asked[:HEAD_BYTES])
    head[_KIND], head[_FLAGS] = kind, flags
    head[_PAYLOAD:HEAD_BYTES] = payload_bytes.to_bytes(4, "little")
    return bytes(head)


def read_reply(head: bytes | bytearray) -> ReplyHead:
    """Kind, owner and size of any reply. Raises FrameError; whether somebody waits for it is not known here."""
    magic, version, kind, dtype, flags, request_id, _, _, _, rows, hidden, _, slot, _, size = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION or dtype not in _ITEM_BYTES:
        raise FrameError(f"not the head of a reply of lane version {VERSION}: {bytes(head[:8]).hex()}")
    if kind == ANSWER:
        if size != rows * hidden * _ITEM_BYTES[dtype] or size > MAX_PAYLOAD_BYTES:
            raise FrameError(f"an answer of {size} bytes for {rows} rows of {hidden}")
    elif not (kind == ERROR and size <= MAX_MESSAGE_BYTES) and not (kind == DRAINING and size == 0):
        raise FrameError(f"a reply of kind {kind} and {size} bytes")
    return ReplyHead(kind, flags, request_id, 0 if kind == ANSWER and slot else size)


def _complaint(head: RowsHead, shape: LaneShape) -> str:
    """What is wrong with a frame of rows, for the log of this side only."""
    if head.magic != MAGIC:
        return f"not a frame: it starts with {head.magic.hex()}"
    if head.version != VERSION:
        return f"a frame of version {head.version}; this side speaks {VERSION}"
    if head.kind != ROWS:
        return f"a frame of kind {head.kind} where rows were expected"
    return (
        f"rows that do not fit this shard: dtype {head.dtype}, flags {head.flags}, layer {head.layer} of "
        f"{shape.num_layers}, {head.rows} rows (counts give {sum(head.counts)}) of {head.hidden} (here "
        f"{shape.hidden}), {head.num_experts} experts, {head.payload_bytes} bytes, slot {head.slot}"
    )
