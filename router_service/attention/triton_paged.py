"""Attention on a GPU over pages where they lie: cuts a step into units of work and starts our Triton kernels for them.

What a unit computes does not depend on how the step is cut (`triton_kernels.py` says why), so this cuts as it suits the
card: tiles of queries, and where too few of those keep it busy, the splits of their contexts. All that a step's kernels
are told is packed into one tensor, copied once, and nothing waits for the device.

That a row of a tile is summed alike wherever it stands in the tile is so in the interpreter, and on an H100.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from cluster.checkpoint.architecture import Architecture
from experts_service.device import upload
from experts_service.kernels.gpu.launch import launch
from router_service.attention.backend import AttentionBackend, AttentionPlan, StaticPlan
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.triton_kernels import (
    MERGED_FIELDS,
    ROW,
    SPLIT,
    TABLE,
    UNIT_FIELDS,
    UNROLLED,
    attend,
    merge,
    write,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_SHARED = 64  # query heads of one key-value head: the rows of a tile
MAX_QUERY_BYTES = 2**15  # of a tile's queries, which lie in shared memory beside keys and values: 99 KiB on small cards
EVERY_KEY = 2**30  # a window that nothing leaves
PROGRAMS = 512  # that keep a card busy: about four for each multiprocessor of a large one
PARTIAL_BYTES = 2**26  # of what splits make; taken before the KV cache is sized, which sees that it is
_STAGES = 2
NOWHERE = -1  # where a row behind the last is written

Numbers = NDArray[np.int32]


def is_served(architecture: Architecture, dtype: torch.dtype) -> bool:
    """Whether the kernels can do this model."""
    shared = architecture.num_heads // architecture.num_kv_heads
    if dtype not in DTYPES or architecture.head_dim > MAX_HEAD_DIM or shared > MAX_SHARED:
        return False
    row_bytes = triton.next_power_of_2(architecture.head_dim) * dtype.itemsize
    return triton.next_power_of_2(shared) * row_bytes <= MAX_QUERY_BYTES  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Partials:
    """What splits make that are added up by another program: rows are those of tiles, split after split."""

    largest: torch.Tensor  # [R, G] of the scores
    total: torch.Tensor  # [R, G] of the weights
    mixed: torch.Tensor  # [R, G, H] of values by weights


class TritonAttention(AttentionBackend):
    """Kernels of our own, compiled by Triton."""

    name = "pages in place, Triton"
    gathers = False

    def __init__(
        self,
        architecture: Architecture,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        groups, head_dim = architecture.num_kv_heads, architecture.head_dim
        page = (groups, block_size, head_dim)
        self.layout = PageLayout(page, page)
        self.groups, self.head_dim, self.block_size = groups, head_dim, block_size
        self.heads = architecture.num_heads // groups  # that share a key-value head
        self.window = architecture.sliding_window or EVERY_KEY
        self.scale = math.log2(math.e) / math.sqrt(head_dim)  # powers of 2 are taken instead of e
        self.dtype, self.device = dtype, device
        self.most_units = -(-PROGRAMS // groups)  # beside one for each tile
        self.head_block = max(16, triton.next_power_of_2(head_dim))
        # float32 is not multiplied by tensor cores: fewer rows, for none is free. Keys and values of a tile are 32 KiB,
        # and twice as much fits the shared memory of any card from compute capability 8.0 on.
        row_bytes = self.head_block * dtype.itemsize
        self.rows = max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(self.heads))
        self.tile = max(16, min(64, 2**14 // row_bytes))
        self.num_warps = 8 if row_bytes > 256 and dtype != torch.float32 else 4

    @cached_property
    def partials(self) -> _Partials:
        """One for all steps, which are one after the other on a device: a captured one finds it where it was."""
        rows = PARTIAL_BYTES // (4 * self.groups * (self.head_dim + 2))
        shape = (rows, self.groups)
        of_row, of_head = (
            torch.empty(size, dtype=torch.float32, device=self.device)
            for size in ((2, *shape), (*shape, self.head_dim))
        )
        return _Partials(of_row[0], of_row[1], of_head)

    def plan(self, metadata: AttentionMetadata) -> TritonPlan:
        """Units of work of the step."""
        work = _cut(metadata, self)
        room = _Room(len(work.units), len(work.merged), len(metadata.write_slots))
        [numbers] = upload([_packed(metadata, self, work, room)], self.device)
        return TritonPlan(self, room, numbers)

    def decode_plan(self, num_sequences: int, max_model_len: int) -> StaticPlan:
        """For steps in which at most so many sequences decode, none longer than that."""
        return _DecodePlan(num_sequences, -(-max_model_len // self.block_size), self)

    def warm_up(self) -> None:
        """Have all kernels compiled, or read from where Triton keeps them: a step does not wait for that."""
        num_blocks = -(-2 * SPLIT // self.block_size)
        kv_cache = KVCache(1, num_blocks, self.layout, dtype=self.dtype, device=self.device)
        heads = self.groups * self.heads
        rows = torch.zeros(1, heads + 2 * self.groups, self.head_dim, dtype=self.dtype, device=self.device)
        block_table = array("i", range(1, 1 + num_blocks))
        plan = self.plan(AttentionMetadata([Span(2 * SPLIT - 1, 1, block_table)], self.block_size))
        queries, keys, values = rows.split([heads, self.groups, self.groups], dim=1)
        plan.attend(0, queries, keys, values, kv_cache)


class TritonPlan(AttentionPlan):
    """What every layer of a step starts."""

    def __init__(self, backend: TritonAttention, room: _Room, numbers: torch.Tensor) -> None:
        """`numbers`: the step, packed into this room, on the device."""
        self._backend, self._room = backend, room
        self._units, self._merged, self._slots = numbers, numbers[room.merged_at :], numbers[room.slots_at :]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""
        backend = self._backend
        keys, values = _without_gaps(keys), _without_gaps(values)
        launch(
            write,
            (self._room.slots,),
            kv_cache.keys[layer],
            kv_cache.values[layer],
            keys,
            values,
            self._slots,
            keys.stride(0),
            values.stride(0),
            GROUPS=backend.groups,
            HEAD_DIM=backend.head_dim,
            BLOCK_SIZE=backend.block_size,
            GROUPS_BLOCK=triton.next_power_of_2(backend.groups),
            HEAD_BLOCK=backend.head_block,
        )

    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""
        backend, partials = self._backend, self._backend.partials
        queries = _without_gaps(queries)
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        launch(
            attend,
            (self._room.units, backend.groups),
            queries,
            kv_cache.keys[layer],
            kv_cache.values[layer],
            output,
            partials.largest,
            partials.total,
            partials.mixed,
            self._units,
            queries.stride(0),
            backend.scale,
            backend.window,
            GROUPS=backend.groups,
            HEADS=backend.heads,
            HEAD_DIM=backend.head_dim,
            BLOCK_SIZE=backend.block_size,
            HEAD_BLOCK=backend.head_block,
            ROWS=backend.rows,
            TILE=backend.tile,
            SPLIT_KEYS=SPLIT,
            num_warps=backend.num_warps,
            num_stages=_STAGES,
        )
        if self._room.merged:
            launch(
                merge,
                (self._room.merged, backend.groups),
                output,
                partials.largest,
                partials.total,
                partials.mixed,
                self._merged,
                GROUPS=backend.groups,
                HEADS=backend.heads,
                HEAD_DIM=backend.head_dim,
                HEADS_BLOCK=triton.next_power_of_2(backend.heads),
                HEAD_BLOCK=backend.head_block,
                UNROLLED_SPLITS=UNROLLED,
            )
        return output


class _DecodePlan(TritonPlan, StaticPlan):
    """The same for many steps: as many programs as the largest of them takes. Those without work end at once."""

    def __init__(self, num_sequences: int, max_blocks: int, backend: TritonAttention) -> None:
        room = _Room(num_sequences + backend.most_units, num_sequences, num_sequences)
        size = room.blocks_at + 1 + num_sequences * max_blocks
        self._numbers = torch.zeros(size, dtype=torch.int32, device=backend.device)
        super().__init__(backend, room, self._numbers)

    def update(self, metadata: AttentionMetadata) -> None:
        """Make it the plan of this step."""
        numbers = _packed(metadata, self._backend, _cut(metadata, self._backend), self._room)
        [there] = upload([numbers], self._backend.device)
        self._numbers[: len(numbers)].copy_(there)


@dataclass(frozen=True, slots=True)
class _Room:
    """How many of each kind a plan has, in this order, before the blocks of its sequences. Each begins at 16 bytes.

    Else Triton compiles a kernel anew for what is less aligned.
    """

    units: int
    merged: int
    slots: int

    @property
    def merged_at(self) -> int:
        return UNIT_FIELDS.value * self.units  # type: ignore[no-any-return]

    @property
    def slots_at(self) -> int:
        return self.merged_at + MERGED_FIELDS.value * self.merged  # type: ignore[no-any-return]

    @property
    def blocks_at(self) -> int:
        return -(-(self.slots_at + self.slots) // 4) * 4


@dataclass(frozen=True, slots=True)
class _Work:
    """A step, cut."""

    units: Numbers  # [U, UNIT_FIELDS], with the sequence's number in place of where its blocks are
    merged: Numbers  # [M, MERGED_FIELDS]


def _cut(metadata: AttentionMetadata, backend: TritonAttention) -> _Work:
    """Tiles of queries; those that would keep a program busy long after the others are cut into runs of splits."""
    heads, most = backend.heads, backend.rows // backend.heads
    lengths = np.diff(metadata.query_starts)  # [B]
    num_tiles = -(-lengths // most)
    sequence, number = _counted(num_tiles)
    first = number * most  # of the sequence's new tokens
    length = np.minimum(most, lengths[sequence] - first)
    row = metadata.query_starts[sequence] + first
    position = metadata.context_lengths[sequence] - lengths[sequence] + first
    begin = np.maximum(0, position - backend.window + 1) // SPLIT
    end = (position + length - 1) // SPLIT + 1
    splits = end - begin

    # At most `most_units` more units than tiles, whatever the step.
    at_once = max(1, -(-int(splits.sum()) // backend.most_units))
    longest_first = np.argsort(-splits, kind="stable")
    rows = np.where(splits > at_once, splits * length * heads, 0)  # of what splits make
    partial = np.empty_like(rows)
    partial[longest_first] = np.cumsum(rows[longest_first])  # where they end
    is_cut = (rows > 0) & (partial <= len(backend.partials.mixed))
    partial = np.where(is_cut, partial - rows, -1)

    each = np.where(is_cut, at_once, splits)
    tile, part = _counted(-(-splits // each))
    unit_begin = begin[tile] + part * each[tile]
    unit_end = np.minimum(unit_begin + each[tile], end[tile])
    of_tile = np.column_stack([row, position, length, sequence])
    units = np.column_stack([of_tile[tile], unit_begin, unit_end, begin[tile], partial[tile]])

    tile, token = _counted(np.where(is_cut, length, 0))
    merged = np.column_stack([row[tile] + token, partial[tile] + token * heads, length[tile] * heads, splits[tile]])
    longest_first = np.argsort(unit_begin - unit_end, kind="stable")
    return _Work(units[longest_first].astype(np.int32), merged.astype(np.int32))


def _packed(metadata: AttentionMetadata, backend: TritonAttention, work: _Work, room: _Room) -> Numbers:
    """All that the kernels are told of a step. Where `room` is for more sequences, the others see the null page."""
    num_tokens, num_units = len(metadata.write_slots), len(work.units)
    assert num_units <= room.units, "more units than there are programs"
    assert len(work.merged) <= room.merged, "more tokens to merge than there are programs"
    assert num_tokens <= room.slots, "more tokens than rows"
    num_blocks = -(-metadata.context_lengths // backend.block_size)  # [B]
    tables = metadata.block_tables
    blocks = tables[np.arange(tables.shape[1]) < num_blocks[:, None]]
    null_at = room.blocks_at
    numbers = np.zeros(null_at + 1 + len(blocks), np.int32)
    numbers[null_at + 1 :] = blocks

    units = numbers[: room.merged_at].reshape(room.units, -1)
    units[:num_units] = work.units
    units[:num_units, TABLE.value] = (null_at + 1 + np.cumsum(num_blocks) - num_blocks)[work.units[:, TABLE.value]]
    others = np.arange(num_tokens, room.slots)
    units[num_units : num_units + len(others)] = [0, 0, 1, null_at, 0, 1, 0, -1]
    units[num_units : num_units + len(others), ROW.value] = others

    numbers[room.merged_at : room.merged_at + work.merged.size] = work.merged.ravel()
    slots = numbers[room.slots_at : room.slots_at + room.slots]
    slots[:num_tokens], slots[num_tokens:] = metadata.write_slots, NOWHERE
    return numbers


def _counted(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[2, 0, 1] of something: whose each is, [0, 0, 2], and the how manieth of its, [0, 1, 0]."""
    whose = np.repeat(np.arange(len(numbers)), numbers)
    return whose, np.arange(len(whose)) - np.repeat(np.cumsum(numbers) - numbers, numbers)


def _without_gaps(x: torch.Tensor) -> torch.Tensor:
    """`x` [T, heads, H], each row without gaps."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
