"""Attention over pages where they lie, for CPUs, compiled by numba. Knows arrays; knows neither torch nor sequences.

The online softmax of arXiv 2205.14135, over tiles of TILE keys, starting anew every SPLIT keys; what splits make is
then added up in their order. Both are cut by a token's position in its own sequence. So each query has its sums in one
order, whatever chunk it came in, whatever else is in the batch, and however its splits are shared over threads: cutting
work in other ways changes no bit.

A page's keys are [G, H, slot]: the scores of sixteen tokens are sixteen lanes, which need no sums across. Its values
are [G, slot, H]. The rows of a unit of work are the queries of some tokens times the heads that share a key-value head.

Shapes: N query heads, G key-value heads, H head_dim, R rows, P blocks of the longest context, B sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from experts_service.kernels.jit import from_bits, kernel, pointer, take
from experts_service.kernels.routine import Routine
from experts_service.kernels.vectors import (
    LANES,
    add,
    divide,
    exp2_below,
    fetch,
    larger,
    largest,
    load,
    multiply,
    multiply_add,
    splat,
    spread,
    store,
    total,
)

Array = Any  # in one dimension, unless said otherwise

TILE = 64  # keys
SPLIT = 1024  # keys
VECTORS = TILE // LANES
NONE = np.float32(-np.inf)

# Columns of a unit of work
SEQUENCE, FIRST, LENGTH, BEGIN_SPLIT, END_SPLIT, PARTIAL, UNIT_FIELDS = 0, 1, 2, 3, 4, 5, 6

# Fields of a step, int64: what all its layers share, addresses of arrays among them.
GROUPS, HEADS, HEAD_DIM, BLOCK_SIZE = 0, 1, 2, 3  # heads: N / G
WINDOW = 4  # tokens that a token sees, itself included; 0: all before it
SCALE = 5  # bits of a float32
SLOTS, NUM_TOKENS = 6, 7  # where each new token goes
QUERY_STARTS, CONTEXT_LENGTHS, BLOCK_TABLES, NUM_SEQUENCES, NUM_BLOCKS = 8, 9, 10, 11, 12  # [B + 1], [B], [B, P], B, P
UNITS, NUM_UNITS, MERGED, NUM_MERGED = 13, 14, 15, 16  # [U, UNIT_FIELDS] each; those to merge were cut into splits
MOST_ROWS = 17  # of a unit
# What was made of splits, of so many rows each: [1], [LANES] and [H] float32 a row
PARTIAL_MAXIMA, PARTIAL_SUMS, PARTIAL_MIXED, STEP_FIELDS = 18, 19, 20, 21


@kernel
def _array(address: int, number: Any) -> Array:
    """Numbers of a type in one dimension. How many is not said: nothing asks."""
    return carray(pointer(address), 1, number)


@kernel
def _write(task, number) -> None:  # type: ignore[no-untyped-def]
    """Put new keys and values, rows of G · H numbers that are `…_stride` apart, where the slots say."""
    step = _array(task[1], np.int64)
    keys, values, new_keys, new_values = (
        _array(task[2], number), _array(task[3], number), _array(task[4], number), _array(task[6], number)
    )  # fmt: skip
    key_stride, value_stride = task[5], task[7]
    slots = _array(step[SLOTS], np.int64)
    num_groups, head_dim, block_size = step[GROUPS], step[HEAD_DIM], step[BLOCK_SIZE]
    for token in range(step[NUM_TOKENS]):
        page, slot = slots[token] // block_size, slots[token] % block_size
        for group in range(num_groups):
            first = (page * num_groups + group) * head_dim * block_size
            for h in range(head_dim):
                keys[first + h * block_size + slot] = new_keys[token * key_stride + group * head_dim + h]
            first += slot * head_dim
            for h in range(head_dim):
                values[first + h] = new_values[token * value_stride + group * head_dim + h]


@kernel
def _scores(queries: Array, row: int, num_rows: int, keys: Array, at: int, block_size: int, head_dim: int,
            scores: Array, column: int, values: Array, next_key: int, next_value: int) -> None:  # fmt: skip
    """Of up to four rows and the sixteen keys at `at`.

    Meanwhile sixteen keys and values of the next tile are brought nearer, where `next_key` is not negative: pages lie
    anywhere, so no CPU foresees which is next. A few at a time; all at once were 0.7 to 0.9 times as fast.
    """
    zero = splat(np.float32(0))
    first = row * head_dim
    into = row * TILE + column
    if num_rows == 4:
        one, two, three, four = zero, zero, zero, zero
        for h in range(head_dim):
            key = load(keys, at + h * block_size)
            one = multiply_add(spread(queries, first + h), key, one)
            two = multiply_add(spread(queries, first + head_dim + h), key, two)
            three = multiply_add(spread(queries, first + 2 * head_dim + h), key, three)
            four = multiply_add(spread(queries, first + 3 * head_dim + h), key, four)
            if next_key >= 0:
                fetch(keys, next_key + h * block_size)
                fetch(values, next_value + h * LANES)
        store(scores, into, one)
        store(scores, into + TILE, two)
        store(scores, into + 2 * TILE, three)
        store(scores, into + 3 * TILE, four)
        return
    for r in range(num_rows):
        sums = zero
        for h in range(head_dim):
            sums = multiply_add(spread(queries, first + r * head_dim + h), load(keys, at + h * block_size), sums)
            if next_key >= 0:
                fetch(keys, next_key + h * block_size)
                fetch(values, next_value + h * LANES)
        store(scores, into + r * TILE, sums)


@kernel
def _soften(scores: Array, row: int, begin: int, end: int, maxima: Array, sums: Array) -> Any:
    """Scores of a row's vectors begin … end - 1 → weights, by the largest so far. What older weights shrink by."""
    into = row * TILE
    highest = splat(NONE)
    for v in range(begin, end):
        highest = larger(load(scores, into + v * LANES), highest)
    before = maxima[row]
    now = max(largest(highest), before)
    maxima[row] = now
    bound = splat(now if now > NONE else np.float32(0))
    shrink = exp2_below(splat(before), bound)
    weights = multiply(load(sums, row * LANES), shrink)
    for v in range(begin, end):
        weight = exp2_below(load(scores, into + v * LANES), bound)
        store(scores, into + v * LANES, weight)
        weights = add(weights, weight)
    store(sums, row * LANES, weights)
    return largest(shrink)


@kernel
def _mix(weights: Array, row: int, num_rows: int, shrinks: Array, values: Array, places: Array, begin: int, end: int,
         head_dim: int, mixed: Array) -> None:  # fmt: skip
    """Add the values of a tile's keys begin … end - 1, by their weights, to what up to four rows have so far."""
    first = row * TILE
    for h in range(0, head_dim, LANES):
        into = row * head_dim + h
        if num_rows == 4:
            one = multiply(load(mixed, into), spread(shrinks, row))
            two = multiply(load(mixed, into + head_dim), spread(shrinks, row + 1))
            three = multiply(load(mixed, into + 2 * head_dim), spread(shrinks, row + 2))
            four = multiply(load(mixed, into + 3 * head_dim), spread(shrinks, row + 3))
            for v in range(begin // LANES, (end + LANES - 1) // LANES):
                for j in range(max(begin, v * LANES), min(end, (v + 1) * LANES)):
                    value = load(values, places[v] + (j - v * LANES) * head_dim + h)
                    one = multiply_add(spread(weights, first + j), value, one)
                    two = multiply_add(spread(weights, first + TILE + j), value, two)
                    three = multiply_add(spread(weights, first + 2 * TILE + j), value, three)
                    four = multiply_add(spread(weights, first + 3 * TILE + j), value, four)
            store(mixed, into, one)
            store(mixed, into + head_dim, two)
            store(mixed, into + 2 * head_dim, three)
            store(mixed, into + 3 * head_dim, four)
        else:
            for r in range(num_rows):
                sums = multiply(load(mixed, into + r * head_dim), spread(shrinks, row + r))
                for v in range(begin // LANES, (end + LANES - 1) // LANES):
                    for j in range(max(begin, v * LANES), min(end, (v + 1) * LANES)):
                        value = load(values, places[v] + (j - v * LANES) * head_dim + h)
                        sums = multiply_add(spread(weights, first + r * TILE + j), value, sums)
                store(mixed, into + r * head_dim, sums)


@kernel
def _clear(num_rows: int, head_dim: int, maxima: Array, sums: Array, mixed: Array) -> None:
    """Rows that have seen nothing. (Numba's assignment to a slice compiles for seconds: it can say what went wrong.)"""
    zero = splat(np.float32(0))
    for row in range(num_rows):
        maxima[row] = NONE
        store(sums, row * LANES, zero)
        for h in range(0, head_dim, LANES):
            store(mixed, row * head_dim + h, zero)


@kernel
def _fold(
    num_rows: int, head_dim: int, maxima: Array, sums: Array, mixed: Array, offset: int,
    all_maxima: Array, all_sums: Array, all_mixed: Array,
) -> None:  # fmt: skip
    """Add what a split made of its rows, which are `offset` rows into its arrays, to what those before it made."""
    for row in range(num_rows):
        before, of_split = all_maxima[row], maxima[offset + row]
        now = max(of_split, before)
        all_maxima[row] = now
        bound = splat(now if now > NONE else np.float32(0))
        shrink, part = exp2_below(splat(before), bound), exp2_below(splat(of_split), bound)
        old = multiply(load(all_sums, row * LANES), shrink)
        store(all_sums, row * LANES, multiply_add(load(sums, (offset + row) * LANES), part, old))
        for h in range(0, head_dim, LANES):
            into, of = row * head_dim + h, (offset + row) * head_dim + h
            store(all_mixed, into, multiply_add(load(mixed, of), part, multiply(load(all_mixed, into), shrink)))


@kernel
def _finish(num_rows: int, heads: int, head_dim: int, sums: Array, mixed: Array, output: Array, at: int,
            stride: int) -> None:  # fmt: skip
    """Write rows to the output: of `heads` heads each token's, tokens `stride` apart."""
    for row in range(num_rows):
        weight = splat(total(load(sums, row * LANES)))
        into = at + (row // heads) * stride + (row % heads) * head_dim
        for h in range(0, head_dim, LANES):
            store(output, into + h, divide(load(mixed, row * head_dim + h), weight))


@kernel
def _attend(task, number) -> None:  # type: ignore[no-untyped-def]
    """Do units of work, for each key-value head, until none is left."""
    step = _array(task[1], np.int64)
    queries, query_stride = _array(task[2], number), task[3]  # rows of N · H numbers, so far apart
    keys, values, output = _array(task[4], number), _array(task[5], number), _array(task[6], number)  # pages; [T, N, H]
    num_groups, heads, head_dim, block_size = step[GROUPS], step[HEADS], step[HEAD_DIM], step[BLOCK_SIZE]
    window, most_rows, num_sequences = step[WINDOW], step[MOST_ROWS], step[NUM_SEQUENCES]
    units = carray(pointer(step[UNITS]), (step[NUM_UNITS], UNIT_FIELDS), np.int64)
    query_starts, context_lengths = _array(step[QUERY_STARTS], np.int32), _array(step[CONTEXT_LENGTHS], np.int32)
    block_tables = carray(pointer(step[BLOCK_TABLES]), (num_sequences, step[NUM_BLOCKS]), np.int32)
    partial_maxima, partial_sums = _array(step[PARTIAL_MAXIMA], np.float32), _array(step[PARTIAL_SUMS], np.float32)
    partial_mixed = _array(step[PARTIAL_MIXED], np.float32)
    wide, mixed = np.empty(most_rows * head_dim, np.float32), np.empty(most_rows * head_dim, np.float32)  # [R, H]
    all_mixed, scores = np.empty(most_rows * head_dim, np.float32), np.empty(most_rows * TILE, np.float32)  # [R, TILE]
    sums, all_sums = np.empty(most_rows * LANES, np.float32), np.empty(most_rows * LANES, np.float32)  # [R, LANES]
    maxima, all_maxima = np.empty(most_rows, np.float32), np.empty(most_rows, np.float32)  # [R]
    shrinks = np.empty(most_rows, np.float32)  # [R]
    key_places, value_places = np.empty(VECTORS, np.int64), np.empty(VECTORS, np.int64)
    seen_from, seen_to = np.empty(most_rows, np.int64), np.empty(most_rows, np.int64)  # keys of a tile, by row
    by_scale = splat(from_bits(np.int32(step[SCALE])))
    while True:
        item = take(task)
        if item >= len(units) * num_groups:
            return
        unit, group = units[item // num_groups], item % num_groups
        sequence, num_tokens = unit[SEQUENCE], unit[LENGTH]
        num_rows = num_tokens * heads
        first_row = query_starts[sequence] + unit[FIRST]  # among the step's tokens
        new_tokens = query_starts[sequence + 1] - query_starts[sequence]
        first_position = context_lengths[sequence] - new_tokens + unit[FIRST]
        for row in range(num_rows):
            at = (first_row + row // heads) * query_stride + (group * heads + row % heads) * head_dim
            for h in range(0, head_dim, LANES):
                store(wide, row * head_dim + h, multiply(load(queries, at + h), by_scale))
        _clear(num_rows, head_dim, all_maxima, all_sums, all_mixed)
        end_key = first_position + num_tokens
        begin_key = max(0, first_position + 1 - window) if window else 0
        for split in range(unit[BEGIN_SPLIT], unit[END_SPLIT]):
            _clear(num_rows, head_dim, maxima, sums, mixed)
            split_begin, split_end = max(begin_key, split * SPLIT), min(end_key, (split + 1) * SPLIT)
            for tile in range(split_begin // TILE * TILE, split_end, TILE):
                begin, end = max(split_begin - tile, 0), min(split_end - tile, TILE)  # keys that any row sees
                first_vector, end_vector = begin // LANES, (end + LANES - 1) // LANES
                for v in range(first_vector, end_vector):
                    position = tile + v * LANES
                    page, slot = block_tables[sequence, position // block_size], position % block_size
                    first = (page * num_groups + group) * head_dim * block_size
                    key_places[v], value_places[v] = first + slot, first + slot * head_dim
                for v in range(first_vector, end_vector):
                    next_key, next_value = -1, -1
                    position = tile + TILE + v * LANES
                    if position < split_end:
                        page, slot = block_tables[sequence, position // block_size], position % block_size
                        first = (page * num_groups + group) * head_dim * block_size
                        next_key, next_value = first + slot, first + slot * head_dim
                    for row in range(0, num_rows, 4):
                        _scores(wide, row, min(4, num_rows - row), keys, key_places[v], block_size, head_dim,
                                scores, v * LANES, values, next_key, next_value)  # fmt: skip
                        next_key = -1  # once is enough
                for row in range(num_rows):
                    position = first_position + row // heads
                    seen_from[row] = max(begin, position + 1 - window - tile) if window else begin
                    seen_to[row] = min(end, position + 1 - tile)
                    for j in range(first_vector * LANES, min(seen_from[row], end_vector * LANES)):
                        scores[row * TILE + j] = NONE
                    for j in range(max(seen_to[row], first_vector * LANES), end_vector * LANES):
                        scores[row * TILE + j] = NONE
                    shrinks[row] = _soften(scores, row, first_vector, end_vector, maxima, sums)
                row = 0
                while row < num_rows:
                    last = min(row + 4, num_rows) - 1
                    if seen_from[last] != seen_from[row] or seen_to[last] != seen_to[row]:
                        last = row  # not even zero times what a row does not see
                    if seen_from[row] < seen_to[row]:
                        _mix(scores, row, last + 1 - row, shrinks, values, value_places, seen_from[row], seen_to[row],
                             head_dim, mixed)  # fmt: skip
                    row = last + 1
            if unit[PARTIAL] < 0:
                _fold(num_rows, head_dim, maxima, sums, mixed, 0, all_maxima, all_sums, all_mixed)
            else:
                at = ((unit[PARTIAL] + split - unit[BEGIN_SPLIT]) * num_groups + group) * most_rows
                for row in range(num_rows):
                    partial_maxima[at + row] = maxima[row]
                    store(partial_sums, (at + row) * LANES, load(sums, row * LANES))
                    for h in range(0, head_dim, LANES):
                        store(partial_mixed, (at + row) * head_dim + h, load(mixed, row * head_dim + h))
        if unit[PARTIAL] < 0:
            stride = num_groups * heads * head_dim
            _finish(num_rows, heads, head_dim, all_sums, all_mixed, output,
                    first_row * stride + group * heads * head_dim, stride)  # fmt: skip


@kernel
def _merge(task, number) -> None:  # type: ignore[no-untyped-def]
    """Add up the splits of each row in their order, as `_attend` does where it does them all."""
    step = _array(task[1], np.int64)
    output = _array(task[2], number)
    num_groups, heads, head_dim, most_rows = step[GROUPS], step[HEADS], step[HEAD_DIM], step[MOST_ROWS]
    units = carray(pointer(step[MERGED]), (step[NUM_MERGED], UNIT_FIELDS), np.int64)
    query_starts = _array(step[QUERY_STARTS], np.int32)
    partial_maxima, partial_sums = _array(step[PARTIAL_MAXIMA], np.float32), _array(step[PARTIAL_SUMS], np.float32)
    partial_mixed = _array(step[PARTIAL_MIXED], np.float32)
    all_mixed, all_sums = np.empty(most_rows * head_dim, np.float32), np.empty(most_rows * LANES, np.float32)
    all_maxima = np.empty(most_rows, np.float32)
    stride = num_groups * heads * head_dim
    while True:
        item = take(task)
        if item >= len(units) * num_groups:
            return
        unit, group = units[item // num_groups], item % num_groups
        num_rows = unit[LENGTH] * heads
        _clear(num_rows, head_dim, all_maxima, all_sums, all_mixed)
        for split in range(unit[END_SPLIT]):
            at = ((unit[PARTIAL] + split) * num_groups + group) * most_rows
            _fold(num_rows, head_dim, partial_maxima, partial_sums, partial_mixed, at, all_maxima, all_sums, all_mixed)
        first_row = query_starts[unit[SEQUENCE]] + unit[FIRST]
        _finish(num_rows, heads, head_dim, all_sums, all_mixed, output,
                first_row * stride + group * heads * head_dim, stride)  # fmt: skip


# Their tasks: the step's fields, then keys and values of a layer and new ones with their strides; queries with their
# stride, keys and values of the layer and the output; the output.


@Routine
def write_bf16(task):  # type: ignore[no-untyped-def]
    """`_write` in bf16, as its bits."""
    _write(task, np.uint16)


@Routine
def write_fp32(task):  # type: ignore[no-untyped-def]
    """`_write` in float32."""
    _write(task, np.float32)


@Routine
def attend_bf16(task):  # type: ignore[no-untyped-def]
    """`_attend` in bf16, as its bits."""
    _attend(task, np.uint16)


@Routine
def attend_fp32(task):  # type: ignore[no-untyped-def]
    """`_attend` in float32."""
    _attend(task, np.float32)


@Routine
def merge_bf16(task):  # type: ignore[no-untyped-def]
    """`_merge` in bf16, as its bits."""
    _merge(task, np.uint16)


@Routine
def merge_fp32(task):  # type: ignore[no-untyped-def]
    """`_merge` in float32."""
    _merge(task, np.float32)
