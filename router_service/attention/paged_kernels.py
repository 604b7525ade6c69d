"""Attention over pages where they lie, for CPUs, compiled by numba. Knows arrays; knows neither torch nor sequences.

The online softmax of arXiv 2205.14135, over tiles of TILE keys, starting anew every SPLIT keys; what splits make is
then added up in their order. Both are cut by a token's position in its own sequence. So each query has its sums in one
order, whatever chunk it came in, whatever else is in the batch, and however its splits are shared over threads: cutting
work in other ways changes no bit.

A page's keys are [G, H, slot]: the scores of sixteen tokens are sixteen lanes, which need no sums across. Its values
are [G, slot, H]. The rows of a unit of work are the queries of some tokens times the heads that share a key-value head.

Keys and values are kept as numbers, float32 or bits of bf16, or as codes: bytes, of which one scale, float32, makes a
token's numbers in a head. Four codes stand together, as two of bf16 do. Scales are behind the codes of a head's keys,
and behind those of sixteen tokens' values. What is multiplied with codes, queries and weights, is integers of 16 bits.

Shapes: N query heads, G key-value heads, H head_dim, R rows, P blocks of the longest context, B sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from experts_service.kernels.compiled.byte_products import COLUMNS as BYTE_COLUMNS
from experts_service.kernels.compiled.byte_products import (
    OFFSET,
    fetch,
    make_row,
    multiply_columns,
    multiply_parts,
    scale_of,
)
from experts_service.kernels.compiled.jit import bits, fma, from_bits, kernel, take
from experts_service.kernels.compiled.products import COLUMNS, ROWS, add_products, products
from experts_service.kernels.compiled.routine import Routine
from experts_service.kernels.compiled.vectors import (
    LANES,
    add,
    address_of,
    divide,
    exp2_below,
    is_any_above,
    larger,
    largest,
    load,
    load_integers,
    multiply,
    multiply_add,
    numbers,
    pair_of,
    splat,
    spread,
    store,
    total,
    weigh,
)

Numbers = Any  # where numbers of a kind begin

TILE = 64  # keys
SPLIT = 1024  # keys
VECTORS = TILE // LANES
NONE = np.float32(-np.inf)

LARGEST_CODE = np.float32(127)
SCALE_CODES = 4  # that a scale takes the room of
_ROUNDER, _ROUNDER_BITS = np.float32(12582912.0), np.int32(0x4B400000)  # 1.5 · 2**23: added to round to an integer
_MAGNITUDE, _INFINITY, _LEAST = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x0D800000)  # bits; 2**-100

# Columns of a unit of work
SEQUENCE, FIRST, LENGTH, FIRST_GROUP, NUM_UNIT_GROUPS = 0, 1, 2, 3, 4
BEGIN_SPLIT, END_SPLIT, PARTIAL, UNIT_FIELDS = 5, 6, 7, 8

# Fields of a step, int64: what all its layers share, addresses of arrays among them.
GROUPS, HEADS, HEAD_DIM, BLOCK_SIZE = 0, 1, 2, 3  # heads: N / G
SLOT_SIZE = 4  # numbers or codes of a slot in a head's keys, and as many in its values: H and what a scale takes
WINDOW = 5  # tokens that a token sees, itself included; 0: all before it
SCALE = 6  # bits of a float32
SLOTS, NUM_TOKENS = 7, 8  # where each new token goes
QUERY_STARTS, CONTEXT_LENGTHS, BLOCK_TABLES, NUM_SEQUENCES, NUM_BLOCKS = 9, 10, 11, 12, 13  # [B + 1], [B], [B, P], B, P
UNITS, NUM_UNITS, MERGED, NUM_MERGED = 14, 15, 16, 17  # [U, UNIT_FIELDS] each; those to merge were cut into splits
MOST_ROWS = 18  # of a unit
# What was made of splits, of so many rows each: [1], [LANES] and [H] float32 a row
PARTIAL_MAXIMA, PARTIAL_SUMS, PARTIAL_MIXED, STEP_FIELDS = 19, 20, 21, 22


@kernel
def _write(task, number) -> None:  # type: ignore[no-untyped-def]
    """Put new keys and values, rows of G · H numbers that are `…_stride` apart, where the slots say.

    A thread that comes late finds no token left: what it would read may be that of the next layer by then.
    """
    step = numbers(task[1], np.int64)
    keys, values = numbers(task[2], number), numbers(task[3], number)
    new_keys, key_stride, new_values, value_stride = (
        numbers(task[4], number),
        task[5],
        numbers(task[6], number),
        task[7],
    )
    slots = numbers(step[SLOTS], np.int64)
    num_groups, head_dim, block_size, pair = step[GROUPS], step[HEAD_DIM], step[BLOCK_SIZE], pair_of(number)
    while True:
        token = take(task)
        if token >= step[NUM_TOKENS]:
            break
        page, slot = slots[token] // block_size, slots[token] % block_size
        for group in range(num_groups):
            page_at = (page * num_groups + group) * head_dim * block_size
            key, value = token * key_stride + group * head_dim, token * value_stride + group * head_dim
            into = page_at + slot * pair
            for h in range(0, head_dim, pair):
                for i in range(pair):
                    keys[into + h * block_size + i] = new_keys[key + h + i]
            into = page_at + slot // pair * pair * head_dim + slot % pair
            for h in range(head_dim):
                values[into + h * pair] = new_values[value + h]


@kernel
def _write_codes(task, number) -> None:  # type: ignore[no-untyped-def]
    """The same, as codes."""
    step = numbers(task[1], np.int64)
    new_keys, key_stride, new_values, value_stride = (
        numbers(task[4], number),
        task[5],
        numbers(task[6], number),
        task[7],
    )
    slots = numbers(step[SLOTS], np.int64)
    num_groups, head_dim, block_size, slot_size = step[GROUPS], step[HEAD_DIM], step[BLOCK_SIZE], step[SLOT_SIZE]
    head = np.empty(head_dim, np.float32)
    wide = numbers(head.ctypes.data, np.float32)
    while True:
        token = take(task)
        if token >= step[NUM_TOKENS]:
            break
        page, slot = slots[token] // block_size, slots[token] % block_size
        for group in range(num_groups):
            page_at = (page * num_groups + group) * slot_size * block_size
            for h in range(0, head_dim, LANES):
                store(wide, h, load(new_keys, token * key_stride + group * head_dim + h))
            into = task[2] + page_at
            _write_head(wide, head_dim, into + 4 * slot, 4 * block_size, into + head_dim * block_size + 4 * slot)
            for h in range(0, head_dim, LANES):
                store(wide, h, load(new_values, token * value_stride + group * head_dim + h))
            into, lane = task[3] + page_at + slot // LANES * LANES * slot_size, slot % LANES
            _write_head(
                wide, head_dim, into + lane // 4 * 4 * head_dim + lane % 4, 0, into + LANES * head_dim + 4 * lane
            )
    head[0] = 0  # it lives until here


@kernel
def _write_head(x: Numbers, head_dim: int, at: int, step: int, scale_at: int) -> None:
    """Codes of the numbers of one head to an address: four together, `step` bytes apart; 0: each four bytes on."""
    codes = numbers(at, np.uint8)
    largest_bits = np.int32(0)
    for h in range(head_dim):
        largest_bits = max(largest_bits, bits(x[h]) & _MAGNITUDE)
    scale, inverse = np.float32(0), np.float32(0)
    if largest_bits >= _INFINITY:
        scale = np.float32(np.nan)
    elif largest_bits > _LEAST:
        scale, inverse = from_bits(largest_bits) / LARGEST_CODE, LARGEST_CODE / from_bits(largest_bits)
    numbers(scale_at, np.float32)[0] = scale
    for h in range(head_dim):
        code = bits(fma(x[h], inverse, _ROUNDER)) - _ROUNDER_BITS if inverse else np.int32(0)
        codes[h // 4 * step + h % 4 if step else 4 * h] = np.uint8(code + OFFSET)


@kernel
def _locate(
    blocks: Numbers, tile: int, begin: int, end: int, block_size: int, page_size: int, slot_size: int, pair: int,
    key_places: Numbers, value_places: Numbers,
) -> None:  # fmt: skip
    """Where the vectors of a tile begin that hold its keys begin … end - 1; in place of the others the last of them.

    Those of the first key-value head: the others' are behind them.
    """
    first, last = begin // LANES, (end + LANES - 1) // LANES
    position = tile + first * LANES
    block, slot = position // block_size, position % block_size
    for v in range(VECTORS):
        page_at = blocks[block] * page_size
        key_places[v], value_places[v] = page_at + slot * pair, page_at + slot * slot_size
        if first <= v < last - 1:
            slot += LANES
            if slot == block_size:
                block, slot = block + 1, 0


@kernel
def _soften(scores: Numbers, row: int, by_scale: Any, weights: Numbers, maxima: Numbers, sums: Numbers) -> Any:
    """Scores of a row → weights, by the largest so far. What older weights shrink by."""
    into = row * TILE
    highest = splat(NONE)
    for v in range(VECTORS):
        highest = larger(load(scores, into + v * LANES), highest)
    highest = multiply(highest, by_scale)
    now, shrink = maxima[row], np.float32(1)
    if is_any_above(highest, splat(now)):  # seldom after the first tiles
        before, now = now, max(largest(highest), now)
        maxima[row] = now
        shrinks = exp2_below(splat(before), splat(now))
        store(sums, row * LANES, multiply(load(sums, row * LANES), shrinks))
        shrink = largest(shrinks)
    bound = splat(now if now > NONE else np.float32(0))
    weight = load(sums, row * LANES)
    for v in range(VECTORS):
        weight = add(weight, weigh(weights, into + v * LANES, load(scores, into + v * LANES), by_scale, bound))
    store(sums, row * LANES, weight)
    return shrink


@kernel
def _take_numbers(_stored: Any, queries: Numbers, at: int, scale: Any, head_dim: int, rows: Numbers, row: int,
                  _spare: Numbers) -> None:  # fmt: skip
    """A query, scaled, as what is multiplied with the cache."""
    for h in range(0, head_dim, LANES):
        store(rows, row * head_dim + h, multiply(load(queries, at + h), scale))


@kernel
def _take_codes(_stored: Any, queries: Numbers, at: int, scale: Any, head_dim: int, rows: Numbers, row: int,
                spare: Numbers) -> None:  # fmt: skip
    """The same as integers. `spare`: [H] float32."""
    for h in range(0, head_dim, LANES):
        store(spare, h, multiply(load(queries, at + h), scale))
    make_row(spare, 0, head_dim, address_of(rows) + 4 * head_dim * row)


@kernel
def _score_numbers(
    stored: Any, num_rows: int, rows: Numbers, row: int, head_dim: int, block_size: int, keys_at: int, places: Numbers,
    scores: Numbers, ahead: Numbers, _spare: Numbers,
) -> None:  # fmt: skip
    """Scores [R, TILE] of one row or ROWS rows, which are not scaled where `_soften` does it."""
    pair = pair_of(stored)
    products(num_rows, rows, row * head_dim, head_dim, numbers(keys_at, stored), places, block_size * pair,
             head_dim // pair, scores, row * TILE, ahead)  # fmt: skip


@kernel
def _score_codes(
    _stored: Any, num_rows: int, rows: Numbers, row: int, head_dim: int, block_size: int, keys_at: int, places: Numbers,
    scores: Numbers, ahead: Numbers, spare: Numbers,
) -> None:  # fmt: skip
    """The same with codes; of a token whose scale is NaN the score is NaN."""
    at, bytes_of_row = address_of(rows) + 4 * head_dim * row, 4 * head_dim
    columns, sums, lines = address_of(spare), address_of(scores) + 4 * row * TILE, address_of(ahead)
    for v in range(VECTORS):
        spare[v] = keys_at + places[v]
    for v in range(0, VECTORS, BYTE_COLUMNS):
        multiply_columns(num_rows, at, bytes_of_row, head_dim // 4, columns + 8 * v, 4 * block_size,
                         sums + 4 * v * LANES, 4 * TILE, lines + 8 * v)  # fmt: skip
    to_scales = head_dim * block_size
    for r in range(num_rows):
        scale = splat(scale_of(at + r * bytes_of_row, head_dim))
        for v in range(VECTORS):
            into, scales = (row + r) * TILE + v * LANES, numbers(spare[v] + to_scales, np.float32)
            store(scores, into, multiply(multiply(load_integers(scores, into), load(scales, 0)), scale))
    if ahead[0]:
        for v in range(VECTORS):
            fetch(ahead[v] + to_scales)


@kernel
def _mix_codes(
    _stored: Any, weights: Numbers, row: int, num_rows: int, shrinks: Numbers, values_at: int, places: Numbers,
    begin: int, end: int, head_dim: int, mixed: Numbers, edge: int, scores: Numbers, ahead: Numbers, _nothing: Numbers,
    spare: Numbers,
) -> None:  # fmt: skip
    """The same with codes. What rows are made of, weights times scales, is written over `scores`."""
    sums, rows_at, bytes_of_row = numbers(edge, np.float32), address_of(scores) + 4 * row * TILE, 4 * TILE
    for v in range(VECTORS):
        spare[v] = values_at + places[v]
    for r in range(num_rows):
        first = (row + r) * TILE
        for v in range(VECTORS):
            scales = numbers(spare[v] + LANES * head_dim, np.float32)
            store(weights, first + v * LANES, multiply(load(weights, first + v * LANES), load(scales, 0)))
        for j in range(min(begin, TILE)):  # not even zero times a scale that a row does not see
            weights[first + j] = 0
        for j in range(max(end, 0), TILE):
            weights[first + j] = 0
        make_row(weights, first, TILE, rows_at + r * bytes_of_row)
    columns = BYTE_COLUMNS if head_dim % (BYTE_COLUMNS * LANES) == 0 else 1
    lines, line, half = head_dim // 4, 0, 0
    for h in range(0, head_dim, columns * LANES):
        spare[VECTORS], spare[VECTORS + 1] = 0, 0
        if ahead[0] and half < VECTORS:
            spare[VECTORS], spare[VECTORS + 1] = ahead[half] + 64 * line, ahead[half + 1] + 64 * line
        multiply_parts(num_rows, columns, rows_at, bytes_of_row, TILE // 4, address_of(spare), 4 * h, 4 * head_dim,
                       edge + 4 * h, 4 * head_dim, address_of(spare) + 8 * VECTORS)  # fmt: skip
        line += TILE // 4
        if line >= lines:
            line, half = line - lines, half + 2
    if ahead[0]:
        for v in range(VECTORS):
            fetch(ahead[v] + 64 * lines)
    for r in range(num_rows):
        scale, shrink = splat(scale_of(rows_at + r * bytes_of_row, TILE)), splat(shrinks[row + r])
        for h in range(0, head_dim, LANES):
            into = (row + r) * head_dim + h
            older = multiply(load(mixed, into), shrink)
            store(mixed, into, multiply_add(load_integers(sums, r * head_dim + h), scale, older))


@kernel
def _mix_numbers(
    stored: Any, weights: Numbers, row: int, num_rows: int, shrinks: Numbers, values_at: int, places: Numbers,
    begin: int, end: int, head_dim: int, mixed: Numbers, edge_at: int, _scores: Numbers, ahead: Numbers,
    nothing: Numbers, _spare: Numbers,
) -> None:  # fmt: skip
    """Add the values of a tile's keys begin … end - 1, by their weights, to what one row or ROWS rows have so far."""
    values, edge, pair = numbers(values_at, stored), numbers(edge_at, stored), pair_of(stored)
    for r in range(row, row + num_rows):
        if shrinks[r] != np.float32(1):
            for h in range(r * head_dim, (r + 1) * head_dim, LANES):
                store(mixed, h, multiply(load(mixed, h), spread(shrinks, r)))
    columns = COLUMNS if head_dim % (COLUMNS * LANES) == 0 else 1
    key = begin
    while key < end:
        # `num_parts` times `count` keys or pairs of keys, from `place` on or from all places.
        source, its_places, place, num_parts, its_ahead = values, nothing, np.int64(0), 1, nothing
        first = row * TILE + key // pair * pair
        upto = min(end, (key // LANES + 1) * LANES)
        count = (upto - key) // pair
        if begin == 0 and end == TILE:
            its_places, num_parts, its_ahead, upto = places, VECTORS, ahead, TILE
        else:
            place = places[key // LANES] + key % LANES // pair * pair * head_dim
            if key % pair or count == 0:
                # Half a pair: not even zero times what a row does not see.
                for h in range(head_dim):
                    edge[pair * h + key % pair] = values[place + pair * h + key % pair]
                    edge[pair * h + 1 - key % pair] = 0
                source, place, count, upto = edge, np.int64(0), 1, key + 1
            else:
                upto = key + count * pair
        along = 0
        for h in range(0, head_dim, columns * LANES):
            add_products(num_rows, columns, weights, first, TILE, source, its_places, num_parts, place + h * pair,
                         head_dim * pair, count, mixed, row * head_dim + h, head_dim, its_ahead, along)  # fmt: skip
            along += num_parts * count
        key = upto


def _either(of_numbers: Any, of_codes: Any) -> Any:
    """One of two kernels, by what is stored, their first argument, when what calls it is compiled."""

    def either(stored: Any, *arguments: Any) -> None:
        raise NotImplementedError(stored, arguments)

    @overload(either)
    def _choose(stored, *arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        chosen = of_codes if stored.dtype == types.uint8 else of_numbers
        return lambda stored, *arguments: chosen(stored, *arguments)

    return either


_take = _either(_take_numbers, _take_codes)
_score = _either(_score_numbers, _score_codes)
_mix = _either(_mix_numbers, _mix_codes)


@kernel
def _clear(num_rows: int, head_dim: int, maxima: Numbers, sums: Numbers, mixed: Numbers) -> None:
    """Rows that have seen nothing."""
    zero = splat(np.float32(0))
    for row in range(num_rows):
        maxima[row] = NONE
        store(sums, row * LANES, zero)
        for h in range(0, head_dim, LANES):
            store(mixed, row * head_dim + h, zero)


@kernel
def _fold(
    num_rows: int, head_dim: int, maxima: Numbers, sums: Numbers, mixed: Numbers, offset: int,
    all_maxima: Numbers, all_sums: Numbers, all_mixed: Numbers,
) -> None:  # fmt: skip
    """Add what a split made of its rows, which are `offset` rows into its numbers, to what those before it made."""
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
def _finish(num_groups: int, num_tokens: int, heads: int, head_dim: int, maxima: Numbers, sums: Numbers, mixed: Numbers,
            sinks_at: int, first_head: int, output: Numbers, at: int, stride: int) -> None:  # fmt: skip
    """Write rows to the output: tokens are `stride` apart there. Sinks, if there are any, take their share first."""
    sinks = numbers(sinks_at, np.float32)
    for row in range(num_groups * num_tokens * heads):
        weight, shrink = splat(total(load(sums, row * LANES))), splat(np.float32(1))
        group, token, head = row // (num_tokens * heads), row // heads % num_tokens, row % heads
        if sinks_at:
            sink = sinks[first_head + group * heads + head]
            now = splat(max(maxima[row], sink))
            shrink = exp2_below(splat(maxima[row]), now)
            weight = multiply_add(weight, shrink, exp2_below(splat(sink), now))
        into = at + token * stride + (group * heads + head) * head_dim
        for h in range(0, head_dim, LANES):
            store(output, into + h, divide(multiply(load(mixed, row * head_dim + h), shrink), weight))


@kernel
def _attend(task, number, stored, factor, weight) -> None:  # type: ignore[no-untyped-def]
    """Do units of work until none is left.

    `number`: of queries and output. `stored`: of the cache. `factor` and `weight`: what is multiplied with its keys and
    values; with codes rows of integers are, and are made of weights in float32.
    """
    step = numbers(task[1], np.int64)
    queries, query_stride = numbers(task[2], number), task[3]  # rows of N · H numbers, so far apart
    output = numbers(task[6], number)  # [T, N, H]
    num_groups, heads, head_dim, block_size = step[GROUPS], step[HEADS], step[HEAD_DIM], step[BLOCK_SIZE]
    window, most_rows, pair, slot_size = step[WINDOW], step[MOST_ROWS], pair_of(stored), step[SLOT_SIZE]
    group_size, page_size = slot_size * block_size, num_groups * slot_size * block_size
    units = numbers(step[UNITS], np.int64)
    query_starts, context_lengths = numbers(step[QUERY_STARTS], np.int32), numbers(step[CONTEXT_LENGTHS], np.int32)
    partial_maxima, partial_sums = numbers(step[PARTIAL_MAXIMA], np.float32), numbers(step[PARTIAL_SUMS], np.float32)
    partial_mixed = numbers(step[PARTIAL_MIXED], np.float32)
    # All that is made on the way. Pointers into one array: to pass arrays on, numba counts who has them, and locks.
    padded = (most_rows + LANES - 1) // LANES * LANES
    size = 4 * (padded * (3 * head_dim + 2 * TILE + 2 * LANES + 3) + ROWS * head_dim)
    scratch = np.empty(size + 8 * (2 * padded + 16 + 11 * VECTORS), np.uint8)
    at = (scratch.ctypes.data + 63) // 64 * 64
    rows, mixed, all_mixed = (
        numbers(at, factor),
        numbers(at + 4 * padded * head_dim, np.float32),
        numbers(at + 8 * padded * head_dim, np.float32),
    )  # [R, H]
    at += 12 * padded * head_dim
    scores, weights = numbers(at, np.float32), numbers(at + 4 * padded * TILE, weight)  # [R, TILE]
    at += 8 * padded * TILE
    sums, all_sums = numbers(at, np.float32), numbers(at + 4 * padded * LANES, np.float32)  # [R, LANES]
    at += 8 * padded * LANES
    maxima, all_maxima, shrinks = (
        numbers(at, np.float32),
        numbers(at + 4 * padded, np.float32),
        numbers(at + 8 * padded, np.float32),
    )  # [R]
    at += 12 * padded
    edge = at  # [H, pair], or [ROWS, H] of sums
    at += 4 * ROWS * head_dim
    seen_from, seen_to = numbers(at, np.int64), numbers(at + 8 * padded, np.int64)  # keys of a tile, by row
    at += 16 * padded
    key_places, value_places = numbers(at, np.int64), numbers(at + 8 * VECTORS, np.int64)
    next_keys, next_values = numbers(at + 16 * VECTORS, np.int64), numbers(at + 24 * VECTORS, np.int64)
    keys_ahead, values_ahead = numbers(at + 32 * VECTORS, np.int64), numbers(at + 40 * VECTORS, np.int64)
    tile_keys, tile_values = numbers(at + 48 * VECTORS, np.int64), numbers(at + 56 * VECTORS, np.int64)
    nothing, spare = numbers(at + 64 * VECTORS, np.int64), numbers(at + 72 * VECTORS, np.int64)
    for v in range(VECTORS):
        nothing[v] = 0
    scale, one = splat(from_bits(np.int32(step[SCALE]))), splat(np.float32(1))
    # Queries in bf16 would be rounded once more.
    by_query, by_score = (one, scale) if pair_of(factor) == 2 else (scale, one)
    while True:
        item = take(task)
        if item >= step[NUM_UNITS]:
            break
        unit = item * UNIT_FIELDS
        sequence, num_tokens = units[unit + SEQUENCE], units[unit + LENGTH]
        first_group, unit_groups = units[unit + FIRST_GROUP], units[unit + NUM_UNIT_GROUPS]
        begin_split, end_split, partial = units[unit + BEGIN_SPLIT], units[unit + END_SPLIT], units[unit + PARTIAL]
        rows_of_group = num_tokens * heads
        num_rows = unit_groups * rows_of_group
        first_row = query_starts[sequence] + units[unit + FIRST]  # among the step's tokens
        new_tokens = query_starts[sequence + 1] - query_starts[sequence]
        first_position = context_lengths[sequence] - new_tokens + units[unit + FIRST]
        for row in range(num_rows):
            head = (first_group + row // rows_of_group) * heads + row % heads
            at = (first_row + row // heads % num_tokens) * query_stride + head * head_dim
            _take(stored, queries, at, by_query, head_dim, rows, row, mixed)
        _clear(num_rows, head_dim, all_maxima, all_sums, all_mixed)
        begin_key = max(0, first_position + 1 - window) if window else 0
        begin_key, end_key = max(begin_key, begin_split * SPLIT), min(first_position + num_tokens, end_split * SPLIT)
        blocks = numbers(step[BLOCK_TABLES] + 4 * sequence * step[NUM_BLOCKS], np.int32)
        tile = begin_key // TILE * TILE
        _locate(blocks, tile, begin_key - tile, min(end_key - tile, TILE), block_size, page_size, slot_size, pair,
                next_keys, next_values)  # fmt: skip
        for split in range(begin_split, end_split):
            _clear(num_rows, head_dim, maxima, sums, mixed)
            split_begin, split_end = max(begin_key, split * SPLIT), min(end_key, (split + 1) * SPLIT)
            for tile in range(split_begin // TILE * TILE, split_end, TILE):
                begin, end = max(split_begin - tile, 0), min(split_end - tile, TILE)  # keys that any row sees
                tile_keys, next_keys = next_keys, tile_keys
                tile_values, next_values = next_values, tile_values
                has_next = tile + TILE < end_key
                if has_next:
                    _locate(blocks, tile + TILE, 0, min(end_key - tile - TILE, TILE), block_size, page_size, slot_size,
                            pair, next_keys, next_values)  # fmt: skip
                # All heads of a tile before the next tile: in memory they are beside each other.
                for group in range(unit_groups):
                    offset, offset_ahead = (first_group + group) * group_size, (first_group + group + 1) * group_size
                    is_last = group + 1 == unit_groups
                    keys_after, values_after = (next_keys, next_values) if is_last else (tile_keys, tile_values)
                    if is_last:
                        offset_ahead = first_group * group_size
                    for v in range(VECTORS):
                        key_places[v], value_places[v] = tile_keys[v] + offset, tile_values[v] + offset
                        keys_ahead[v] = task[4] + (keys_after[v] + offset_ahead) * (4 // pair)
                        values_ahead[v] = task[5] + (values_after[v] + offset_ahead) * (4 // pair)
                    fetches = has_next or not is_last
                    of_group = group * rows_of_group
                    row = of_group
                    while row < of_group + rows_of_group:
                        together = ROWS if row + ROWS <= of_group + rows_of_group else 1
                        _score(stored, together, rows, row, head_dim, block_size, task[4], key_places, scores,
                               keys_ahead if fetches and row == of_group else nothing, spare)  # fmt: skip
                        row += together
                    row = of_group
                    for token in range(num_tokens):
                        position = first_position + token
                        seen_begin = max(begin, position + 1 - window - tile) if window else begin
                        seen_end = min(end, position + 1 - tile)
                        for _ in range(heads):
                            seen_from[row], seen_to[row] = seen_begin, seen_end
                            for j in range(min(seen_begin, TILE)):
                                scores[row * TILE + j] = NONE
                            for j in range(max(seen_end, 0), TILE):
                                scores[row * TILE + j] = NONE
                            shrinks[row] = _soften(scores, row, by_score, weights, maxima, sums)
                            row += 1
                    row = of_group
                    while row < of_group + rows_of_group:
                        together, last = 1, row + ROWS - 1
                        if (
                            last < of_group + rows_of_group
                            and seen_from[last] == seen_from[row]
                            and seen_to[last] == seen_to[row]
                        ):
                            together = ROWS
                        _mix(stored, weights, row, together, shrinks, task[5], value_places, seen_from[row],
                             seen_to[row], head_dim, mixed, edge, scores,
                             values_ahead if fetches and row == of_group else nothing, nothing, spare)  # fmt: skip
                        row += together
            if partial < 0:
                _fold(num_rows, head_dim, maxima, sums, mixed, 0, all_maxima, all_sums, all_mixed)
            else:
                at = (partial + split - begin_split) * most_rows
                for row in range(num_rows):
                    partial_maxima[at + row] = maxima[row]
                    store(partial_sums, (at + row) * LANES, load(sums, row * LANES))
                    for h in range(0, head_dim, LANES):
                        store(partial_mixed, (at + row) * head_dim + h, load(mixed, row * head_dim + h))
        if partial < 0:
            stride = num_groups * heads * head_dim
            first_head = first_group * heads
            _finish(unit_groups, num_tokens, heads, head_dim, all_maxima, all_sums, all_mixed, task[7], first_head,
                    output, first_row * stride + first_head * head_dim, stride)  # fmt: skip
    scratch[0] = 0  # it lives until here


@kernel
def _merge(task, number) -> None:  # type: ignore[no-untyped-def]
    """Add up the splits of each row in their order, as `_attend` does where it does them all."""
    step = numbers(task[1], np.int64)
    output = numbers(task[2], number)
    num_groups, heads, head_dim, most_rows = step[GROUPS], step[HEADS], step[HEAD_DIM], step[MOST_ROWS]
    units, query_starts = numbers(step[MERGED], np.int64), numbers(step[QUERY_STARTS], np.int32)
    partial_maxima, partial_sums = numbers(step[PARTIAL_MAXIMA], np.float32), numbers(step[PARTIAL_SUMS], np.float32)
    partial_mixed = numbers(step[PARTIAL_MIXED], np.float32)
    scratch = np.empty(most_rows * (head_dim + LANES + 1), np.float32)
    at = scratch.ctypes.data
    all_mixed, all_sums = numbers(at, np.float32), numbers(at + 4 * most_rows * head_dim, np.float32)
    all_maxima = numbers(at + 4 * most_rows * (head_dim + LANES), np.float32)
    stride = num_groups * heads * head_dim
    while True:
        item = take(task)
        if item >= step[NUM_MERGED]:
            break
        unit = item * UNIT_FIELDS
        num_tokens, first_group, unit_groups = (
            units[unit + LENGTH], units[unit + FIRST_GROUP], units[unit + NUM_UNIT_GROUPS]
        )  # fmt: skip
        num_rows = unit_groups * num_tokens * heads
        _clear(num_rows, head_dim, all_maxima, all_sums, all_mixed)
        for split in range(units[unit + END_SPLIT]):
            at = (units[unit + PARTIAL] + split) * most_rows
            _fold(num_rows, head_dim, partial_maxima, partial_sums, partial_mixed, at, all_maxima, all_sums, all_mixed)
        first_row = query_starts[units[unit + SEQUENCE]] + units[unit + FIRST]
        first_head = first_group * heads
        _finish(unit_groups, num_tokens, heads, head_dim, all_maxima, all_sums, all_mixed, task[3], first_head,
                output, first_row * stride + first_head * head_dim, stride)  # fmt: skip
    scratch[0] = 0  # it lives until here


# Their tasks: the step's fields, then keys and values of a layer and new ones with their strides; queries with their
# stride, keys and values of the layer, the output and sinks; the output and sinks. Sinks are [N] float32, scores times
# log2(e), or 0: there are none.


@Routine
def write_bf16(task):  # type: ignore[no-untyped-def]
    """`_write` in bf16, as its bits."""
    _write(task, np.uint16)


@Routine
def write_fp32(task):  # type: ignore[no-untyped-def]
    """`_write` in float32."""
    _write(task, np.float32)


@Routine
def write_bf16_codes(task):  # type: ignore[no-untyped-def]
    """`_write_codes` of bf16."""
    _write_codes(task, np.uint16)


@Routine
def write_fp32_codes(task):  # type: ignore[no-untyped-def]
    """`_write_codes` of float32."""
    _write_codes(task, np.float32)


@Routine
def attend_bf16(task):  # type: ignore[no-untyped-def]
    """`_attend` in bf16, as its bits; widened."""
    _attend(task, np.uint16, np.uint16, np.float32, np.float32)


@Routine
def attend_bf16_dot(task):  # type: ignore[no-untyped-def]
    """`_attend` in bf16, with the CPU's dot product of it."""
    _attend(task, np.uint16, np.uint16, np.uint16, np.uint16)


@Routine
def attend_fp32(task):  # type: ignore[no-untyped-def]
    """`_attend` in float32."""
    _attend(task, np.float32, np.float32, np.float32, np.float32)


@Routine
def attend_bf16_codes(task):  # type: ignore[no-untyped-def]
    """`_attend` of queries in bf16 over codes."""
    _attend(task, np.uint16, np.uint8, np.uint8, np.float32)


@Routine
def attend_fp32_codes(task):  # type: ignore[no-untyped-def]
    """`_attend` of queries in float32 over codes."""
    _attend(task, np.float32, np.uint8, np.uint8, np.float32)


@Routine
def merge_bf16(task):  # type: ignore[no-untyped-def]
    """`_merge` in bf16, as its bits."""
    _merge(task, np.uint16)


@Routine
def merge_fp32(task):  # type: ignore[no-untyped-def]
    """`_merge` in float32."""
    _merge(task, np.float32)
