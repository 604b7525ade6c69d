"""Attention on a CPU over pages where they lie: cuts a step into units of work and has threads do them.

What a unit computes does not depend on how the step is cut (`paged_kernels.py` says why), so this cuts as it suits the
machine: tiles of queries that share what they read, and where too few of those keep all threads busy, the splits of
their contexts.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.checkpoint.architecture import Architecture
from cluster.planning.step_memory import PARTIAL_BYTES
from experts_service.kernels.threads import KernelThreads
from experts_service.kernels.vectors import LANES
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.paged_kernels import SPLIT, UNIT_FIELDS, attend, merge, row_size, write_pages

_ROWS = 64  # of a tile of queries: tokens times the heads that share a key-value head
_UNITS_PER_THREAD = 4  # the fewer, the longer all wait for the last; more of them cost little
_LITTLE_WORK = 4_000_000  # multiplications, 0.1 ms: what another thread is worth waking for


def is_served(architecture: Architecture, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can do this model: whole vectors in heads and in pages."""
    return (
        device.type == "cpu"
        and dtype in (torch.bfloat16, torch.float32)
        and architecture.head_dim % LANES == 0
        and block_size % LANES == 0
    )


class PagedAttention(AttentionBackend):
    """Kernels of our own, compiled by numba."""

    name = "pages in place, numba"
    gathers = False

    def __init__(self, architecture: Architecture, *, block_size: int, num_threads: int) -> None:
        groups, head_dim = architecture.num_kv_heads, architecture.head_dim
        self.layout = PageLayout(keys=(groups, head_dim, block_size), values=(groups, block_size, head_dim))
        self.groups, self.head_dim, self.block_size = groups, head_dim, block_size
        self.heads = architecture.num_heads // groups  # that share a key-value head
        self.window = architecture.sliding_window or 0
        self.scale = math.log2(math.e) / math.sqrt(head_dim)  # powers of 2 are taken instead of e
        self.threads = KernelThreads(num_threads)
        most_rows = max(_ROWS, self.heads)
        self.scratch = [np.empty(most_rows * row_size(head_dim), np.float32) for _ in range(num_threads)]

    def warm_up(self, dtype: torch.dtype) -> None:
        """Have all kernels compiled, or read from where they are kept: a step does not wait for that."""
        cache = KVCache(1, 1, self.layout, dtype=dtype, device=torch.device("cpu"))
        plan = self.plan(AttentionMetadata([Span(0, 1, array("i", [1]))], self.block_size))
        numbers = torch.zeros(1, self.groups * (self.heads + 2), self.head_dim, dtype=dtype)
        queries, keys, values = numbers.split([self.groups * self.heads, self.groups, self.groups], dim=1)
        plan.attend(0, queries, keys, values, cache)
        plan.merge(_rows(queries)[0])

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
        work = total * backend.groups * 2 * backend.head_dim
        self._num_threads = min(backend.threads.number, 1 + work // _LITTLE_WORK)
        # Tiles that would keep one thread busy long after the others are cut into runs of splits.
        most = total * backend.groups // (self._num_threads * _UNITS_PER_THREAD) if self._num_threads > 1 else total
        units: list[tuple[int, ...]] = []
        merged: list[tuple[int, ...]] = []
        num_partials = 0
        self._partial_rows = max(tile.length for tile in tiles) * backend.heads
        bytes_of_split = 4 * backend.groups * self._partial_rows * (1 + LANES + backend.head_dim)
        for tile in tiles:
            parts = min(len(tile.splits), -(-tile.cost // max(1, most)))
            if parts > 1 and (num_partials + len(tile.splits)) * bytes_of_split <= PARTIAL_BYTES:
                each = -(-len(tile.splits) // parts)
                for begin in range(0, len(tile.splits), each):
                    run = tile.splits[begin : begin + each]
                    units.append((tile.sequence, tile.first, tile.length, run.start, run.stop, num_partials + begin))
                merged.append((tile.sequence, tile.first, tile.length, 0, len(tile.splits), num_partials))
                num_partials += len(tile.splits)
            else:
                units.append((tile.sequence, tile.first, tile.length, tile.splits.start, tile.splits.stop, -1))
        self._units, self._merged = _table(units), _table(merged)
        rows = num_partials * backend.groups * self._partial_rows
        self._partial_maxima = np.empty(rows, np.float32)
        self._partial_sums = np.empty(rows * LANES, np.float32)
        self._partial_mixed = np.empty(rows * backend.head_dim, np.float32)

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
        backend = self._backend
        new_keys, key_stride = _rows(keys)
        new_values, value_stride = _rows(values)
        write_pages(
            *kv_cache.arrays[layer],
            new_keys,
            new_values,
            key_stride,
            value_stride,
            self._metadata.write_slots,
            backend.groups,
            backend.head_dim,
            backend.block_size,
        )

    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""
        backend, metadata = self._backend, self._metadata
        output = torch.empty(queries.shape, dtype=queries.dtype)
        written, _ = _rows(output)
        numbers, stride = _rows(queries)
        scratch = list(backend.scratch)
        self._run(
            lambda ticket: attend(
                ticket,
                self._units,
                numbers,
                stride,
                metadata.query_starts,
                metadata.context_lengths,
                metadata.block_tables,
                *kv_cache.arrays[layer],
                backend.groups,
                backend.heads,
                backend.head_dim,
                backend.block_size,
                backend.window,
                backend.scale,
                scratch.pop(),
                self._partial_maxima,
                self._partial_sums,
                self._partial_mixed,
                self._partial_rows,
                written,
            )
        )
        if len(self._merged):
            self.merge(written)
        return output

    def merge(self, output: NDArray[Any]) -> None:
        """Add up the splits that were done apart."""
        backend = self._backend
        merge(
            self._merged,
            self._metadata.query_starts,
            backend.groups,
            backend.heads,
            backend.head_dim,
            backend.scratch[0],
            self._partial_maxima,
            self._partial_sums,
            self._partial_mixed,
            self._partial_rows,
            output,
        )

    def _run(self, kernel: Any) -> None:
        self._backend.threads.run(partial(kernel, np.zeros(1, np.int64)), self._num_threads)


def _table(units: list[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(units, dtype=np.int64).reshape(len(units), UNIT_FIELDS)


def _rows(x: torch.Tensor) -> tuple[NDArray[Any], int]:
    """The numbers of `x` [T, heads, H] from the first to the last, bf16 as bits, and how far its rows are apart."""
    num_rows, heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    stride = x.stride(0) if num_rows > 1 else heads * head_dim
    flat = x.as_strided(((num_rows - 1) * stride + heads * head_dim,), (1,))
    return (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy(), stride
