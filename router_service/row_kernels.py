"""What is done to each row between two matmuls of a layer, compiled: bf16 on a CPU. Knows arrays; knows no tensor.

Each rounds to bf16 wherever the same lines of torch do, so that all but `norm` and `choose` have torch's bits: those
two sum in an order of their own, or take e^x by another polynomial. A row's bits depend on nothing but the row. The
items that threads share are blocks of rows.

What they are for: torch takes some 70 calls a layer for this, of 3 to 10 microseconds each whatever they do.

Shapes: T tokens, D hidden size, K experts per token, E experts. Widths are multiples of LANES.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from experts_service.kernels.compiled.jit import from_bits, kernel, pointer, take, widen
from experts_service.kernels.compiled.matmul import exp
from experts_service.kernels.compiled.routine import Routine
from experts_service.kernels.compiled.vectors import (
    LANES,
    add,
    load,
    multiply,
    multiply_add,
    rounded,
    rounded_number,
    splat,
    store,
    store_rounded,
    total,
)

ROWS = 16  # of an item

_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel
def _array(address: int, number: Any) -> Any:
    """Numbers of a type in one dimension. How many is not said: nothing asks."""
    return carray(pointer(address), 1, number)


@Routine
def norm(task):  # type: ignore[no-untyped-def]
    """`x` [T, D] += `delta`, where its address is not 0; `rows` [T, D] = x / rms(x), rounded, · `weight` [D]."""
    num_rows, width, epsilon = task[1], task[2], from_bits(np.int32(task[3]))
    x, delta, weight, rows = (
        _array(task[4], np.uint16), _array(task[5], np.uint16), _array(task[6], np.uint16), _array(task[7], np.uint16)
    )  # fmt: skip
    adds = task[5] != 0
    while True:
        first = take(task) * ROWS
        if first >= num_rows:
            return
        for row in range(first, min(first + ROWS, num_rows)):
            squares = splat(_ZERO)
            for i in range(row * width, (row + 1) * width, LANES):
                value = load(x, i)
                if adds:
                    value = rounded(add(value, load(delta, i)))
                    store(x, i, value)
                squares = multiply_add(value, value, squares)
            mean = total(squares) / np.float32(width)
            scale = splat(_ONE / math.sqrt(mean + epsilon))
            for i in range(0, width, LANES):
                scaled = rounded(multiply(load(x, row * width + i), scale))
                store(rows, row * width + i, multiply(scaled, load(weight, i)))


@Routine
def rotate(task):  # type: ignore[no-untyped-def]
    """The first `heads` heads of each row of `x`, rows that are `stride` apart, by the angles of its position.

    `cosines` and `sines` [T, H], of which both halves are the same.
    """
    num_rows, heads, head_dim, stride = task[1], task[2], task[3], task[4]
    x, cosines, sines = _array(task[5], np.uint16), _array(task[6], np.uint16), _array(task[7], np.uint16)
    half = head_dim // 2
    minus = splat(-_ONE)
    while True:
        begin = take(task) * ROWS
        if begin >= num_rows:
            return
        for row in range(begin, min(begin + ROWS, num_rows)):
            for head in range(heads):
                for h in range(0, half, LANES):
                    at = row * stride + head * head_dim + h
                    cosine, sine = load(cosines, row * head_dim + h), load(sines, row * head_dim + h)
                    first, second = load(x, at), load(x, at + half)
                    turned = multiply_add(rounded(multiply(second, sine)), minus, rounded(multiply(first, cosine)))
                    store(x, at, turned)
                    store(x, at + half, add(rounded(multiply(second, cosine)), rounded(multiply(first, sine))))


@Routine
def choose(task):  # type: ignore[no-untyped-def]
    """Softmax of `scores` [T, E] → `probabilities` [T, E]; the K highest → `experts` [T, K], `weights` [T, K].

    `doubts` [1] is 1 where a row's choice is torch's: not finite, or one that is chosen has its like among all.
    """
    num_rows, num_experts, top_k = task[1], task[2], task[3]
    scores, probabilities = _array(task[4], np.uint16), _array(task[5], np.float32)
    weights, experts, doubts = _array(task[6], np.float32), _array(task[7], np.int64), _array(task[8], np.int64)
    while True:
        begin = take(task) * ROWS
        if begin >= num_rows:
            return
        for row in range(begin, min(begin + ROWS, num_rows)):
            at = row * num_experts
            highest = widen(scores[at])
            for e in range(num_experts):
                highest = max(highest, widen(scores[at + e]))
            whole = _ZERO
            for e in range(num_experts):
                probabilities[at + e] = exp(widen(scores[at + e]) - highest)  # type: ignore[no-untyped-call]
                whole += probabilities[at + e]
            for e in range(num_experts):
                probabilities[at + e] /= whole
            if not whole > _ZERO:  # NaN
                doubts[0] = 1
            before = np.float32(np.inf)
            chosen = _ZERO
            for k in range(top_k):
                best, number, index = -_ONE, 0, 0
                for e in range(num_experts):
                    probability = probabilities[at + e]
                    if probability < before and probability >= best:
                        number = number + 1 if probability == best else 1
                        if number == 1:
                            best, index = probability, e
                if number != 1:
                    doubts[0] = 1
                before = best
                experts[row * top_k + k], weights[row * top_k + k] = index, best
                chosen += best
            for k in range(top_k):
                weights[row * top_k + k] /= chosen


@kernel
def _term(task, places, pairs, row, k):  # type: ignore[no-untyped-def]
    """Of the k-th that a row's sum is made of: where its answer is, and which of the row's weights it has."""
    num_rows = task[1]
    place, choice = k, k
    if task[6] != 0:
        place = places[k * num_rows + row]
    if task[7] != 0:
        choice = pairs[k * num_rows + row] // num_rows
    return place, choice


@Routine
def combine(task):  # type: ignore[no-untyped-def]
    """`totals` [T, D] = the sum of each row's `answers` [K · T, D], times their `weights` [T, K], experts ascending.

    `places` [K, T] says where a row's answers are, 0: row after row. `pairs` [K, T] where their weights are, choice · T
    + row, 0: as they stand. Each term and each sum is rounded.
    """
    num_rows, top_k, width = task[1], task[2], task[3]
    answers, weights, totals = _array(task[4], np.uint16), _array(task[5], np.float32), _array(task[8], np.uint16)
    places, pairs = _array(task[6], np.int64), _array(task[7], np.int64)
    while True:
        first = take(task) * ROWS
        if first >= num_rows:
            return
        for row in range(first, min(first + ROWS, num_rows)):
            for k in range(top_k):
                place, choice = _term(task, places, pairs, row, k)  # type: ignore[no-untyped-call]
                weight = splat(weights[row * top_k + choice])
                for i in range(0, width, LANES):
                    term = rounded(multiply(load(answers, place * width + i), weight))
                    if k:
                        term = add(load(totals, row * width + i), term)
                    store(totals, row * width + i, term)


@Routine
def combine_in_place(task):  # type: ignore[no-untyped-def]
    """The same of answers that lie in pieces, each number read once. task[12] is 1 where a total is not finite.

    Piece p begins with the answer of `table` [p], and lies at the address that follows; entries are `stride` apart.
    """
    num_rows, top_k, width = task[1], task[2], task[3]
    stride, number = task[10], task[11]
    table, weights, totals = (
        carray(pointer(task[4]), 1, np.int64),
        _array(task[5], np.float32),
        _array(task[8], np.uint16),
    )
    places, pairs = _array(task[6], np.int64), _array(task[7], np.int64)
    nothing = splat(_ZERO)
    of_row, lie_at = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
    while True:
        first = take(task) * ROWS
        if first >= num_rows:
            return
        odd = nothing  # 0 · x is no number where x is not finite
        for row in range(first, min(first + ROWS, num_rows)):
            for k in range(top_k):
                place, choice = _term(task, places, pairs, row, k)  # type: ignore[no-untyped-call]
                piece = number - 1
                while table[piece * stride] > place:
                    piece -= 1
                lie_at[k] = table[piece * stride + 1] + 2 * width * (place - table[piece * stride])
                of_row[k] = weights[row * top_k + choice]
                odd = multiply_add(splat(of_row[k]), nothing, odd)
            at = row * width
            if top_k == 2:
                left, right = _array(lie_at[0], np.uint16), _array(lie_at[1], np.uint16)
                of_left, of_right = splat(of_row[0]), splat(of_row[1])
                for i in range(0, width, LANES):
                    term = rounded_number(multiply(load(left, i), of_left))
                    term = rounded_number(add(term, rounded_number(multiply(load(right, i), of_right))))
                    odd = multiply_add(term, nothing, odd)
                    store_rounded(totals, at + i, term)
                continue
            for i in range(0, width, LANES):
                term = rounded_number(multiply(load(_array(lie_at[0], np.uint16), i), splat(of_row[0])))
                for k in range(1, top_k):
                    more = multiply(load(_array(lie_at[k], np.uint16), i), splat(of_row[k]))
                    term = rounded_number(add(term, rounded_number(more)))
                odd = multiply_add(term, nothing, odd)
                store_rounded(totals, at + i, term)
        if total(odd) != _ZERO:
            task[12] = 1
