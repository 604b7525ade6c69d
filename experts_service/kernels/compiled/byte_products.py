"""Rows of integers times bytes that lie anywhere: the inner loops of attention over keys and values of 8 bits.

    row    [2 W + 2]   int32   of W · 4 numbers of 16 bits: W words of their upper digits, W of their lower ones, then
                               their scale as float32, and what the bytes' OFFSET takes from each sum
    bytes  W vectors           of LANES columns each, four numbers of each column together, OFFSET more than they mean
    sums   [R, C, LANES]       int32

Sums are of integers, so they are exact in any order and the same on every CPU, whichever way it multiplies:
`quantized_tile.py` has both. A row's largest number is LARGEST, so each is off by half a 32,512th of it at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from experts_service.kernels.compiled.jit import kernel
from experts_service.kernels.compiled.products import fetch_line, several_or_one
from experts_service.kernels.compiled.quantized_tile import DIGITS, dot_bytes, dot_shorts
from experts_service.kernels.compiled.vectors import (
    FLOATS,
    LANES,
    VECTOR,
    add,
    fma_of,
    larger,
    largest,
    load,
    multiply,
    numbers,
    splat,
    total,
)

OFFSET = 128
LARGEST = 127 * 256
ROWS = 4  # at once, with two sums of two blocks of columns each: what 32 registers hold beside what is multiplied
COLUMNS = 2  # blocks of LANES

_LEAST = np.float32(2.0**-100)  # of a row's largest number: below it all are zero, or its inverse were infinite
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 · 2**23: what is added to it is rounded to an integer

_BYTE, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_INTS, _BYTES = ir.VectorType(_I32, LANES), ir.VectorType(_BYTE, LANES)


@kernel
def make_row(x: Any, at: int, count: int, row: int) -> None:
    """Make the row at an address of `count` float32, a multiple of LANES. Its scale is NaN if one is not finite."""
    most, minus_one = splat(np.float32(0)), splat(np.float32(-1))
    for k in range(0, count, LANES):
        number = load(x, at + k)
        most = larger(number, larger(multiply(number, minus_one), most))
    highest = largest(most)
    inverse = np.float32(LARGEST) / highest if highest > _LEAST else np.float32(0)
    by, whole = splat(inverse), splat(np.float32(0))
    for k in range(0, count, LANES):
        whole = add(whole, _store_digits(row + k, row + k + count, load(x, at + k), by))
    sum_of_row = total(whole)  # of integers, exact below 2**24; NaN where a number is, or is infinite
    scale, correction = np.float32(np.nan), np.int32(0)
    if sum_of_row == sum_of_row:
        scale = highest / np.float32(LARGEST) if highest > _LEAST else np.float32(0)
        correction = np.int32(sum_of_row) * np.int32(-OFFSET)
    numbers(row + 2 * count, np.float32)[0] = scale
    numbers(row + 2 * count, np.int32)[1] = correction


@kernel
def scale_of(row: int, count: int) -> Any:
    """The scale of the row of `count` numbers at an address."""
    return numbers(row + 2 * count, np.float32)[0]


@intrinsic  # type: ignore[untyped-decorator]
def fetch(_context: Any, _address: Any) -> Any:
    """Bring the line at an address nearer. Any address will do."""

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        fetch_line(builder, _pointer(builder, arguments[0], _BYTE))
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _store_digits(_context: Any, _upper: Any, _lower: Any, _value: Any, _by: Any) -> Any:
    """Write sixteen products, rounded once to integers, to two addresses as digits. Returns them as float32."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        upper_at, lower_at, value, by = arguments
        shifted = fma_of(builder, value, by, ir.Constant(FLOATS, [_MAGIC] * LANES))
        integers = builder.sub(builder.bitcast(shifted, _INTS), _ints(_MAGIC_BITS))
        if DIGITS:
            upper, lower = builder.ashr(builder.add(integers, _ints(128)), _ints(8)), integers
            kind, parts = _BYTES, (upper, lower)
        else:  # a pair of the first and third of each four, and one of the others
            kind = ir.VectorType(ir.IntType(16), LANES // 2)
            undefined = ir.Constant(_INTS, ir.Undefined)
            halves = [ir.Constant(ir.VectorType(_I32, LANES // 2), [*range(first, LANES, 2)]) for first in (0, 1)]
            parts = tuple(builder.shuffle_vector(integers, undefined, half) for half in halves)
        for address, part in zip((upper_at, lower_at), parts, strict=True):
            builder.store(builder.trunc(part, kind), _pointer(builder, address, kind), align=1)
        return builder.fsub(shifted, ir.Constant(FLOATS, [_MAGIC] * LANES))

    return VECTOR(types.int64, types.int64, VECTOR, VECTOR), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply_columns(
    _context: Any, _num_rows: Any, _rows: Any, _row_bytes: Any, _words: Any, _columns: Any, _step: Any, _sums: Any,
    _sums_bytes: Any, _ahead: Any,
) -> Any:  # fmt: skip
    """`sums` of ROWS rows or one, times COLUMNS blocks of columns, whose vectors are `step` bytes apart.

    All are int64, addresses and numbers of bytes. `words`: W. `columns`: of the blocks' addresses. `ahead`: of two
    addresses of what is laid out as the blocks are and read next, or of two zeros.
    """

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        num_rows, rows, row_bytes, words, columns, step, sums, sums_bytes, ahead = arguments
        firsts, next_firsts = _two(builder, columns), _two(builder, ahead)

        def vectors(k: Any) -> list[Any]:
            return [builder.add(first, builder.mul(k, step)) for first in firsts]

        def lines(k: Any) -> list[Any]:
            return [builder.add(first, builder.mul(k, step)) for first in next_firsts]

        def of_rows(number: int) -> None:
            loop = _Loop(builder, number, COLUMNS, rows, row_bytes, words)
            loop.run(vectors, next_firsts[0], lines, sums, sums_bytes)

        several_or_one(builder, num_rows, ROWS, of_rows)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply_parts(
    _context: Any, _num_rows: Any, _num_columns: Any, _rows: Any, _row_bytes: Any, _words: Any, _parts: Any,
    _offset: Any, _step: Any, _sums: Any, _sums_bytes: Any, _ahead: Any,
) -> Any:  # fmt: skip
    """The same, where COLUMNS blocks or one are side by side, and cut into parts of four words of a row.

    `parts`: of the parts' addresses; the first block begins `offset` bytes behind them. `ahead`: of two addresses of as
    many lines as there are words, or of two zeros.
    """

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        num_rows, num_columns, rows, row_bytes, words, parts, offset, step, sums, sums_bytes, ahead = arguments
        next_firsts = _two(builder, ahead)

        def lines(k: Any) -> list[Any]:
            return [builder.add(first, builder.mul(k, _int(4 * LANES))) for first in next_firsts]

        def of_columns(number: int) -> Callable[[int], None]:
            def vectors(k: Any) -> list[Any]:
                part = _address(builder, parts, builder.lshr(k, _int(2)))
                first = builder.add(builder.add(part, offset), builder.mul(builder.and_(k, _int(3)), step))
                return [builder.add(first, _int(4 * LANES * column)) for column in range(number)]

            def of_rows(number_of_rows: int) -> None:
                loop = _Loop(builder, number_of_rows, number, rows, row_bytes, words)
                loop.run(vectors, next_firsts[0], lines, sums, sums_bytes)

            return of_rows

        several_or_one(
            builder, num_columns, COLUMNS, lambda number: several_or_one(builder, num_rows, ROWS, of_columns(number))
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), build


class _Loop:
    """Over the words of some rows, each of which meets a vector of each block of columns."""

    def __init__(self, builder: Any, num_rows: int, num_columns: int, rows: Any, row_bytes: Any, words: Any) -> None:
        self._builder, self._num_columns, self._words = builder, num_columns, words
        self._rows = [
            _pointer(builder, builder.add(rows, builder.mul(row_bytes, _int(row))), _I32) for row in range(num_rows)
        ]

    def run(
        self, vectors: Callable[[Any], list[Any]], has_lines: Any, lines: Callable[[Any], list[Any]], sums: Any,
        sums_bytes: Any,
    ) -> None:  # fmt: skip
        """With the k-th word of each row: the addresses of its vectors, and of what is fetched, if `has_lines`."""
        b = self._builder
        places = [(row, column) for row in range(len(self._rows)) for column in range(self._num_columns)]
        correction_at = b.add(b.add(self._words, self._words), _int(1))
        corrections = [self._word(row, correction_at) for row in self._rows]
        fetches = b.icmp_signed("!=", has_lines, _int(0))
        before = b.block
        body, after = b.append_basic_block("word"), b.append_basic_block("sums")
        b.branch(body)

        b.position_at_end(body)
        k = b.phi(_I64)
        k.add_incoming(_int(0), before)
        lower, upper = {place: b.phi(_INTS) for place in places}, {place: b.phi(_INTS) for place in places}
        loaded = [b.load(_pointer(b, at, _INTS), align=4) for at in vectors(k)]
        digits = [[self._word(row, at) for at in (k, b.add(k, self._words))] for row in self._rows]
        sums_of = {
            place: self._step(digits[place[0]], loaded[place[1]], upper[place], lower[place]) for place in places
        }
        with b.if_then(fetches):
            for line in lines(k):
                fetch_line(b, _pointer(b, line, _BYTE))
        following = b.add(k, _int(1))
        k.add_incoming(following, b.block)
        for place in places:
            upper[place].add_incoming(_ints(0), before)
            lower[place].add_incoming(corrections[place[0]], before)
            upper[place].add_incoming(sums_of[place][0], b.block)
            lower[place].add_incoming(sums_of[place][1], b.block)
        b.cbranch(b.icmp_signed("<", following, self._words), body, after)

        b.position_at_end(after)
        for row, column in places:
            upper_sum, lower_sum = sums_of[row, column]
            at = b.add(b.add(sums, b.mul(sums_bytes, _int(row))), _int(4 * LANES * column))
            b.store(b.add(b.shl(upper_sum, _ints(8)), lower_sum), _pointer(b, at, _INTS), align=4)

    def _step(self, digits: list[Any], vector: Any, upper: Any, lower: Any) -> tuple[Any, Any]:
        """Both sums after a word; where digits are pairs the upper one stays zero."""
        if DIGITS:
            return dot_bytes(self._builder, upper, vector, digits[0]), dot_bytes(
                self._builder, lower, vector, digits[1]
            )
        return upper, dot_shorts(self._builder, lower, vector, *digits)

    def _word(self, row: Any, index: Any) -> Any:
        """In all lanes."""
        b, undefined = self._builder, ir.Constant(_INTS, ir.Undefined)
        word = b.insert_element(undefined, b.load(b.gep(row, [index]), align=4), ir.Constant(_I32, 0))
        return b.shuffle_vector(word, undefined, _ints(0))


def _two(builder: Any, addresses: Any) -> list[Any]:
    return [_address(builder, addresses, _int(i)) for i in range(COLUMNS)]


def _address(builder: Any, addresses: Any, index: Any) -> Any:
    return builder.load(builder.gep(_pointer(builder, addresses, _I64), [index]))


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)
