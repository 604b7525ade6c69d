"""Attention over pages where they lie, for GPUs, compiled by Triton. Knows tensors on a device; knows no sequence.

The online softmax of arXiv 2205.14135, over tiles of keys, starting anew every SPLIT keys; what splits make is then
added up in their order. Both are cut by a token's position in its own sequence. Prompts and decoding are one kernel
with one shape of tiles, and what is added up in another kernel is added up by the same operations (`_add_split`). So
each query has its sums in one order, whatever chunk it came in, whatever else is in the batch, and whether one program
had all its splits or each had one.

A page's keys and values are [G, slot, H]. The rows of a tile are the queries of some tokens times the heads that share
a key-value head: row r is head r % HEADS of token r // HEADS. They are ROWS whatever there is to do: a token that
decodes has HEADS of them, and the others are computed for nothing. The card waits for keys and values meanwhile.

Numbers that change from step to step come in `plan`, one tensor of int32 (`triton_paged.py` packs it): kernels are
compiled once for a model, and a step that was captured is told of a new one by a copy.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim.
"""

from __future__ import annotations

# What Triton compiles has no types, and its constants capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
import triton
import triton.language as tl

# A unit of work in `plan`: queries of some tokens of one sequence over some splits of its context. These are its
# columns. One of no tokens is none.
ROW, POSITION, LENGTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of its first token: where in the step
TABLE = tl.constexpr(3)  # where in `plan` the numbers of the sequence's blocks are
BEGIN_SPLIT, END_SPLIT, FIRST_SPLIT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)  # its own, the tile's first
PARTIAL = tl.constexpr(7)  # first row of what the tile's splits make; -1: one program has them all
UNIT_FIELDS = tl.constexpr(8)
# A token whose splits are to be added up. One of no splits is none.
MERGED_ROW, MERGED_PARTIAL, MERGED_STRIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MERGED_SPLITS, MERGED_FIELDS = tl.constexpr(3), tl.constexpr(4)

SPLIT = 512  # keys
UNROLLED = 8  # splits that are read at once while they are added up, one by one


@triton.jit
def write(
    keys,  # [P, G, slot, H]
    values,
    new_keys,  # [T, G, H], rows `…_stride` apart
    new_values,
    plan,
    key_stride,
    value_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> None:
    """Put the keys and values of one token where `plan`, which begins with slots here, says. Slot -1: nowhere."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(plan + token).to(tl.int64)
    if slot < 0:
        return
    group = tl.arange(0, GROUPS_BLOCK)[:, None]
    h = tl.arange(0, HEAD_BLOCK)[None, :]
    there = (group < GROUPS) & (h < HEAD_DIM)
    into = ((slot // BLOCK_SIZE * GROUPS + group) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + h
    of = group * HEAD_DIM + h
    tl.store(keys + into, tl.load(new_keys + token * key_stride + of, mask=there), mask=there)
    tl.store(values + into, tl.load(new_values + token * value_stride + of, mask=there), mask=there)


@triton.jit
def _add_split(largest, total, mixed, of_largest, of_total, of_mixed):
    """What some splits made, and one more. Products and sums are told apart: nothing is rounded otherwise elsewhere."""
    together = tl.maximum(largest, of_largest)
    base = tl.where(together == float("-inf"), 0.0, together)  # rows that have seen nothing yet
    before, new = tl.exp2(largest - base), tl.exp2(of_largest - base)
    total = tl.fma(total, before, of_total * new)
    mixed = tl.fma(mixed, before[:, None], of_mixed * new[:, None])
    return together, total, mixed


@triton.jit
def _attended(mixed, total, is_row):
    """Values by weights that add up to one. A row that is none may have seen nothing."""
    return mixed / tl.where(is_row, total, 1.0)[:, None]


@triton.jit
def attend(
    queries,  # [T, N, H], rows `query_stride` apart
    keys,  # [P, G, slot, H]
    values,
    output,  # [T, N, H]
    partial_largest,  # [R, G] float32
    partial_total,
    partial_mixed,  # [R, G, H]
    plan,  # [U, UNIT_FIELDS] at its beginning, blocks of sequences anywhere
    query_stride,
    scale,  # of scores, for powers of 2
    window,  # tokens that a token sees, itself included
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,  # N / G
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # keys
    SPLIT_KEYS: tl.constexpr,
) -> None:
    """One unit of work, for one key-value head."""
    unit = plan + tl.program_id(0) * UNIT_FIELDS
    group = tl.program_id(1)
    num_tokens = tl.load(unit + LENGTH)
    if num_tokens == 0:
        return
    first_row = tl.load(unit + ROW).to(tl.int64)
    first_position = tl.load(unit + POSITION)
    table = plan + tl.load(unit + TABLE)
    begin_split, end_split, first_split = (
        tl.load(unit + BEGIN_SPLIT),
        tl.load(unit + END_SPLIT),
        tl.load(unit + FIRST_SPLIT),
    )
    partial = tl.load(unit + PARTIAL)

    row = tl.arange(0, ROWS)
    token = row // HEADS
    h = tl.arange(0, HEAD_BLOCK)
    is_head = h < HEAD_DIM
    is_row = token < num_tokens
    head = group * HEADS + row % HEADS
    query_at = (first_row + token) * query_stride + head * HEAD_DIM
    asked = is_row[:, None] & is_head[None, :]
    query = tl.load(queries + query_at[:, None] + h[None, :], mask=asked, other=0.0)  # [ROWS, H]

    position = first_position + token
    low = tl.maximum(first_position - window + 1, 0)  # of keys that any of these tokens sees
    high = first_position + num_tokens

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    for split in range(begin_split, end_split):
        of_largest = tl.full([ROWS], float("-inf"), tl.float32)
        of_total = tl.zeros([ROWS], tl.float32)
        of_mixed = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
        first_key = tl.maximum(split * SPLIT_KEYS, low // TILE * TILE)
        end_key = tl.minimum((split + 1) * SPLIT_KEYS, high)
        for tile in range(first_key, end_key, TILE):
            key = tile + tl.arange(0, TILE)
            is_key = (key >= low) & (key < high)  # others are not read: they may be NaN
            block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            at = ((block * GROUPS + group) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
            read = is_key[:, None] & is_head[None, :]
            of_keys = tl.load(keys + at[:, None] + h[None, :], mask=read, other=0.0)  # [TILE, H]
            scores = tl.dot(query, tl.trans(of_keys), input_precision="ieee") * scale
            seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(of_largest, tl.max(scores, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)  # rows that have seen nothing yet
            weights = tl.exp2(scores - base[:, None])
            before = tl.exp2(of_largest - base)
            of_total = of_total * before + tl.sum(weights, 1)
            of_values = tl.load(values + at[:, None] + h[None, :], mask=read, other=0.0)
            of_mixed = tl.dot(
                weights.to(of_values.dtype), of_values, of_mixed * before[:, None], input_precision="ieee"
            )
            of_largest = larger
        if partial < 0:
            largest, total, mixed = _add_split(largest, total, mixed, of_largest, of_total, of_mixed)
        else:
            partial_at = (partial + (split - first_split) * num_tokens * HEADS + row).to(tl.int64) * GROUPS + group
            tl.store(partial_largest + partial_at, of_largest, mask=is_row)
            tl.store(partial_total + partial_at, of_total, mask=is_row)
            tl.store(partial_mixed + partial_at[:, None] * HEAD_DIM + h[None, :], of_mixed, mask=asked)
    if partial < 0:
        output_at = ((first_row + token) * (GROUPS * HEADS) + head) * HEAD_DIM
        attended = _attended(mixed, total, is_row).to(output.dtype.element_ty)
        tl.store(output + output_at[:, None] + h[None, :], attended, mask=asked)


@triton.jit
def merge(
    output,  # [T, N, H]
    partial_largest,  # [R, G] float32
    partial_total,
    partial_mixed,  # [R, G, H]
    plan,  # [M, MERGED_FIELDS] at its beginning
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    UNROLLED_SPLITS: tl.constexpr,
) -> None:
    """Add up the splits of one token, for the heads that share one key-value head."""
    merged = plan + tl.program_id(0) * MERGED_FIELDS
    group = tl.program_id(1)
    num_splits = tl.load(merged + MERGED_SPLITS)
    if num_splits == 0:
        return
    token = tl.load(merged + MERGED_ROW).to(tl.int64)
    partial, stride = tl.load(merged + MERGED_PARTIAL), tl.load(merged + MERGED_STRIDE)
    row = tl.arange(0, HEADS_BLOCK)
    h = tl.arange(0, HEAD_BLOCK)
    is_row = row < HEADS
    asked = is_row[:, None] & (h < HEAD_DIM)[None, :]
    largest = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_BLOCK], tl.float32)
    mixed = tl.zeros([HEADS_BLOCK, HEAD_BLOCK], tl.float32)
    for first in range(0, num_splits, UNROLLED_SPLITS):
        for i in tl.static_range(UNROLLED_SPLITS):
            split = first + i
            there = is_row & (split < num_splits)  # what is not there adds nothing, to the bit
            at = (partial + split * stride + row).to(tl.int64) * GROUPS + group
            of_largest = tl.load(partial_largest + at, mask=there, other=float("-inf"))
            of_total = tl.load(partial_total + at, mask=there, other=0.0)
            of_mixed = tl.load(
                partial_mixed + at[:, None] * HEAD_DIM + h[None, :], mask=asked & (split < num_splits), other=0.0
            )
            largest, total, mixed = _add_split(largest, total, mixed, of_largest, of_total, of_mixed)
    output_at = (token * (GROUPS * HEADS) + group * HEADS + row) * HEAD_DIM
    attended = _attended(mixed, total, is_row).to(output.dtype.element_ty)
    tl.store(output + output_at[:, None] + h[None, :], attended, mask=asked)
