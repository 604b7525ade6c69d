"""Attention on a CPU over pages where they lie: cuts a step into units of work and has threads do them.

What a unit computes does not depend on how the step is cut (`paged_kernels.py` says why), so this cuts as it suits the
machine: tiles of queries that share what they read, and where too few of those keep all threads busy, the splits of
their contexts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.checkpoint.architecture import Architecture
from cluster.planning.step_memory import PARTIAL_BYTES
from experts_service.kernels.compiled.routine import Routine, Task, num_threads
from experts_service.kernels.compiled.tile import DOT, FMA, HAS_DOT
from experts_service.kernels.compiled.vectors import LANES
from router_service.attention.backend import AttentionBackend, AttentionPlan, ChainedAttention
from router_service.attention.kv_cache import IN_8_BITS, KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata
from router_service.attention.paged_kernels import (
    SCALE_CODES,
    SPLIT,
    STEP_FIELDS,
    UNIT_FIELDS,
    attend_bf16,
    attend_bf16_codes,
    attend_bf16_dot,
    attend_fp32,
    attend_fp32_codes,
    merge_bf16,
    merge_fp32,
    write_bf16,
    write_bf16_codes,
    write_fp32,
    write_fp32_codes,
)

_ROWS = 64  # of a tile of queries: tokens times the heads that share a key-value head
_UNITS_PER_THREAD = 8  # the fewer, the longer all wait for the last; more of them cost little

_WRITE: dict[torch.dtype, Routine] = {torch.bfloat16: write_bf16, torch.float32: write_fp32}
_ATTEND: dict[tuple[torch.dtype, int], Routine] = {
    (torch.bfloat16, FMA): attend_bf16,
    (torch.bfloat16, DOT): attend_bf16_dot,
    (torch.float32, FMA): attend_fp32,
    (torch.float32, DOT): attend_fp32,
}
# With codes there is one way to multiply: sums of integers are the same whichever instruction makes them.
_WRITE_CODES: dict[torch.dtype, Routine] = {torch.bfloat16: write_bf16_codes, torch.float32: write_fp32_codes}
_ATTEND_CODES: dict[torch.dtype, Routine] = {torch.bfloat16: attend_bf16_codes, torch.float32: attend_fp32_codes}
_MERGE: dict[torch.dtype, Routine] = {torch.bfloat16: merge_bf16, torch.float32: merge_fp32}
_MAX_HEAD_DIM_OF_CODES = 256  # more products of 24 bits than that may not fit 32


BEST = DOT if HAS_DOT else FMA


def warm_up(dtype: torch.dtype, arithmetic: int = BEST, *, of_codes: bool = False) -> None:
    """Have all kernels compiled, or read from where they are kept: a step does not wait for that."""
    for routine in (_writer(dtype, of_codes), _attender(dtype, arithmetic, of_codes), _MERGE[dtype]):
        routine.load()


def _writer(dtype: torch.dtype, of_codes: bool) -> Routine:
    return _WRITE_CODES[dtype] if of_codes else _WRITE[dtype]


def _attender(dtype: torch.dtype, arithmetic: int, of_codes: bool) -> Routine:
    return _ATTEND_CODES[dtype] if of_codes else _ATTEND[dtype, arithmetic]


def is_served(
    architecture: Architecture, block_size: int, dtype: torch.dtype, device: torch.device, *, of_codes: bool = False
) -> bool:
    """Whether the kernels can do this model: whole vectors in heads and in pages."""
    return (
        device.type == "cpu"
        and dtype in _WRITE
        and architecture.head_dim % LANES == 0
        and block_size % LANES == 0
        and not (of_codes and architecture.head_dim > _MAX_HEAD_DIM_OF_CODES)
    )


class PagedAttention(AttentionBackend):
    """Kernels of our own, compiled by numba."""

    gathers = False

    def __init__(
        self,
        architecture: Architecture,
        *,
        block_size: int,
        arithmetic: int = BEST,
        of_codes: bool = False,
        scaling: float | None = None,
    ) -> None:
        """`arithmetic`: how bf16 is multiplied, as in tile.py. `of_codes`: keys and values are kept in 8 bits.

        `scaling`: of scores; None: 1 / sqrt(head_dim).
        """
        self.name = "pages in place, numba" + (IN_8_BITS if of_codes else "")
        groups, head_dim = architecture.num_kv_heads, architecture.head_dim
        self.slot_size = head_dim + (SCALE_CODES if of_codes else 0)
        # In bf16 two of head_dim stand together in keys, and two slots in values; of codes four do.
        self.layout = PageLayout(
            keys=(groups, self.slot_size, block_size),
            values=(groups, block_size, self.slot_size),
            dtype=torch.uint8 if of_codes else None,
        )
        self.groups, self.head_dim, self.block_size = groups, head_dim, block_size
        self.heads = architecture.num_heads // groups  # that share a key-value head
        self.window = architecture.sliding_window or 0
        of_scores = math.log2(math.e)  # powers of 2 are taken instead of e
        scale = np.float32(of_scores / math.sqrt(head_dim) if scaling is None else of_scores * scaling)
        self.scale = int(scale.view(np.int32))
        self.arithmetic, self.of_codes = arithmetic, of_codes

    def plan(self, metadata: AttentionMetadata) -> PagedPlan:
        """Units of work of the step."""
        return PagedPlan(metadata, self)


@dataclass(slots=True)
class _Tile:
    """Queries of one sequence that share what they read."""

    sequence: int
    first: int  # of its new tokens
    length: int
    splits: range
    cost: int  # keys times rows


class PagedPlan(AttentionPlan):
    """What the threads do in each layer of one step."""

    def __init__(self, metadata: AttentionMetadata, backend: PagedAttention) -> None:
        self._metadata, self._backend = metadata, backend
        tiles = sorted(self._tiles(), key=lambda tile: -tile.cost)
        total = sum(tile.cost for tile in tiles)
        numbers = 2 * backend.groups * backend.head_dim  # of a token's keys and values
        read = sum(tile.cost // tile.length for tile in tiles) // backend.heads * numbers
        item_bytes = (torch.uint8 if backend.of_codes else torch.bfloat16).itemsize
        self._num_threads = num_threads(item_bytes * read, total * numbers)
        # Tiles that would keep one thread busy long after the others are cut into runs of splits, and by heads.
        most = total * backend.groups // (self._num_threads * _UNITS_PER_THREAD) if self._num_threads > 1 else None
        units: list[tuple[int, ...]] = []
        merged: list[tuple[int, ...]] = []
        num_partials = 0
        most_rows = max(tile.length * backend.heads * self._groups_at_once(tile, most) for tile in tiles)
        bytes_of_split = 4 * most_rows * (1 + LANES + backend.head_dim)
        for tile in tiles:
            num_splits, at_once = len(tile.splits), self._groups_at_once(tile, most)
            for group in range(0, backend.groups, at_once):
                groups = min(at_once, backend.groups - group)
                parts = min(num_splits, -(-tile.cost * groups // max(1, most))) if most is not None else 1
                of_tile = (tile.sequence, tile.first, tile.length, group, groups)
                if parts == 1 or (num_partials + num_splits) * bytes_of_split > PARTIAL_BYTES:
                    units.append((*of_tile, tile.splits.start, tile.splits.stop, -1))
                    continue
                each = -(-num_splits // parts)
                for begin in range(0, num_splits, each):
                    run = tile.splits[begin : begin + each]
                    units.append((*of_tile, run.start, run.stop, num_partials + begin))
                merged.append((*of_tile, 0, num_splits, num_partials))
                num_partials += num_splits
        rows = num_partials * most_rows
        self._num_merged = len(merged)
        self._arrays: list[NDArray[Any]] = [
            metadata.write_slots,
            metadata.query_starts,
            metadata.context_lengths,
            metadata.block_tables,
            _table(units),
            _table(merged),
            *(np.empty(rows * width, np.float32) for width in (1, LANES, backend.head_dim)),
        ]  # as long as their addresses are used
        slots, starts, contexts, blocks, done, to_merge, *partial = (array.ctypes.data for array in self._arrays)
        self._step = np.array(
            [
                *(backend.groups, backend.heads, backend.head_dim, backend.block_size, backend.slot_size),
                *(backend.window, backend.scale),
                *(slots, len(metadata.write_slots)),
                *(starts, contexts, blocks, *metadata.block_tables.shape),
                *(done, len(units), to_merge, len(merged)),
                *(most_rows, *partial),
            ],
            dtype=np.int64,
        )  # in the order of the kernels' fields
        assert len(self._step) == STEP_FIELDS
        self._fields = self._step.ctypes.data

    def _groups_at_once(self, tile: _Tile, most: int | None) -> int:
        """How many key-value heads one unit has: what they read is side by side, as far as their rows fit a cache."""
        groups = max(1, min(self._backend.groups, _ROWS // (tile.length * self._backend.heads)))
        while most is not None and groups > 1 and tile.cost * groups > most * len(tile.splits):
            groups = -(-groups // 2)
        return groups

    def _tiles(self) -> list[_Tile]:
        backend, metadata = self._backend, self._metadata
        starts = metadata.query_starts.tolist()
        contexts = metadata.context_lengths.tolist()
        most = max(1, _ROWS // backend.heads)
        tiles = []
        for sequence, context in enumerate(contexts):
            num_tokens = starts[sequence + 1] - starts[sequence]
            for first in range(0, num_tokens, most):
                length = min(most, num_tokens - first)
                position = context - num_tokens + first
                begin = max(0, position + 1 - backend.window) if backend.window else 0
                end = position + length
                splits = range(begin // SPLIT, -(-end // SPLIT))
                tiles.append(_Tile(sequence, first, length, splits, (end - begin) * length * backend.heads))
        return tiles

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""
        keys, key_stride = _rows(keys)
        values, value_stride = _rows(values)
        _writer(keys.dtype, self._backend.of_codes).run(
            1,
            self._fields,
            kv_cache.keys[layer].data_ptr(),
            kv_cache.values[layer].data_ptr(),
            keys.data_ptr(),
            key_stride,
            values.data_ptr(),
            value_stride,
        )

    def read(
        self, layer: int, queries: torch.Tensor, kv_cache: KVCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H].

        `sinks` [N]: scores of what has no value, and takes its share all the same.
        """
        queries, stride = _rows(queries)
        output = torch.empty(queries.shape, dtype=queries.dtype)
        scaled = None if sinks is None else sinks.float() * math.log2(math.e)
        sinks_at = 0 if scaled is None else scaled.data_ptr()
        _attender(queries.dtype, self._backend.arithmetic, self._backend.of_codes).run(
            self._num_threads,
            self._fields,
            queries.data_ptr(),
            stride,
            kv_cache.keys[layer].data_ptr(),
            kv_cache.values[layer].data_ptr(),
            output.data_ptr(),
            sinks_at,
        )
        if self._num_merged:
            self.merge(output, sinks_at)
        return output

    def merge(self, output: torch.Tensor, sinks_at: int = 0) -> None:
        """Add up the splits that were done apart."""
        _MERGE[output.dtype].run(1, self._fields, output.data_ptr(), sinks_at)

    def chained(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kv_cache: KVCache,
    ) -> ChainedAttention | None:
        """Of kernels of our own."""
        return _Chained(self._backend, queries, keys, values, output, kv_cache)

    def put(self, fields: NDArray[np.int64]) -> int:
        """Write the step's fields elsewhere. Returns how many threads are worth it."""
        fields[:] = self._step
        return self._num_threads


class _Chained(ChainedAttention):
    """The plan's fields are copied to where the tasks look for them."""

    def __init__(
        self,
        backend: PagedAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kv_cache: KVCache,
    ) -> None:
        self._backend, self._queries, self._keys, self._values = backend, queries, keys, values
        self._output, self._kv_cache = output, kv_cache
        self._fields = np.zeros(STEP_FIELDS, np.int64)
        self._plan: AttentionPlan | None = None  # which has what the fields are addresses of

    def set_plan(self, plan: AttentionPlan) -> int:
        """A step's."""
        assert isinstance(plan, PagedPlan), "made by a plan of this kind, and used for others"
        self._plan = plan
        return plan.put(self._fields)

    def tasks(self, layer: int) -> list[Task]:
        """Three; the last finds nothing to do unless contexts were split."""
        dtype, of_codes = self._queries.dtype, self._backend.of_codes
        fields, output = self._fields.ctypes.data, self._output.data_ptr()
        cached = (self._kv_cache.keys[layer].data_ptr(), self._kv_cache.values[layer].data_ptr())
        (keys, key_stride), (values, value_stride), (queries, stride) = map(
            _rows, (self._keys, self._values, self._queries)
        )
        new = (keys.data_ptr(), key_stride, values.data_ptr(), value_stride)
        attend = _attender(dtype, self._backend.arithmetic, of_codes)
        return [
            Task(_writer(dtype, of_codes), 1, (fields, *cached, *new), (self,)),
            Task(attend, 1, (fields, queries.data_ptr(), stride, *cached, output, 0), (self,)),
            Task(_MERGE[dtype], 1, (fields, output, 0), (self,)),
        ]


def _table(units: list[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(units, dtype=np.int64).reshape(len(units), UNIT_FIELDS)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` [T, heads, H], each row without gaps, and how far its rows are apart."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)
