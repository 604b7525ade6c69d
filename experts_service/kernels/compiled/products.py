"""Rows times vectors that lie anywhere, all sums in registers: the inner loops of attention. Knows no page, no softmax.

    x    [R, K]              rows of numbers
    w    K / P vectors       of LANES columns each, P numbers of k of each column together, `w_step` numbers apart
    sums [R, C, LANES]       float32; up to four rows times four blocks of LANES columns at once

P is 1 where `w` is float32, and 2 where it is bits of bf16. Then `x` says how they are multiplied. Where `x` is float32
`w` is widened, and each product is added with one rounding, the lower k first: the same bits on every CPU. Where `x` is
bits of bf16 as well the CPU's own dot product of pairs adds two products at once (AVX512-BF16).

Every sum is added up in ascending k, one product or pair after the other, whatever rows and columns are beside it.

Meanwhile lines of memory that are read next are brought nearer, four with each k: pages lie anywhere, so no CPU
foresees which is next, and those that are asked for all at once are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from experts_service.kernels.compiled.tile import add_dot, splat_bits
from experts_service.kernels.compiled.vectors import FLOATS, LANES, fma_of, spread_of

ROWS = 4  # at once; a Zen 4 begins a dot product in each cycle and has its sum after six, so four sums are too few
COLUMNS = 4  # blocks of LANES

_BYTE, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_PAIRS = ir.VectorType(_I32, LANES)
_LINE_BYTES = 64


@intrinsic  # type: ignore[untyped-decorator]
def products(
    _context: Any, _num_rows: Any, x: Any, _x_at: Any, _x_step: Any, w: Any, _places: Any, _w_step: Any, _count: Any,
    _sums: Any, _sums_at: Any, _ahead: Any,
) -> Any:  # fmt: skip
    """Write `sums` of ROWS rows or one, and COLUMNS blocks that begin at `places` of `w`, over `count` vectors each.

    `ahead`: four addresses of what is laid out as the blocks are, or 0.
    """

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        num_rows, x_array, x_at, x_step, w_array, places, w_step, count, sums, sums_at, ahead = arguments
        w_at = [_at(builder, w_array, place) for place in _four(builder, places)]
        ahead_at = _four(builder, ahead)
        step_bytes = builder.mul(w_step, _int(w.dtype.bitwidth // 8))

        def of_rows(rows: int) -> None:
            loop = _Loop(builder, x.dtype, w.dtype, _at(builder, x_array, x_at), x_step, w_step, rows, COLUMNS)
            totals = loop.run([[_ZERO] * COLUMNS] * rows, _int(0), w_at, count, ahead_at, _int(0), step_bytes)
            loop.store(totals, _at(builder, sums, sums_at), _int(COLUMNS * LANES))

        several_or_one(builder, num_rows, ROWS, of_rows)
        return context.get_dummy_value()

    return types.void(types.intp, x, types.intp, types.intp, w, _places, types.intp, types.intp, _sums, types.intp,
                      _ahead), build  # fmt: skip


@intrinsic  # type: ignore[untyped-decorator]
def add_products(
    _context: Any, _num_rows: Any, _num_columns: Any, x: Any, _x_at: Any, _x_step: Any, w: Any, _places: Any,
    _number: Any, _offset: Any, _w_step: Any, _count: Any, _sums: Any, _sums_at: Any, _sums_step: Any, _ahead: Any,
    _along: Any,
) -> Any:  # fmt: skip
    """Add to `sums` of ROWS rows or one, and of COLUMNS blocks or one that follow each other.

    k runs over `number` parts of `count` vectors each, which begin `offset` behind the first `places`. `ahead`: four
    addresses, whose lines are taken from the one numbered `along` on, or 0.
    """

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (num_rows, num_columns, x_array, x_at, x_step, w_array, places, number, offset, w_step, count, sums, sums_at,
         sums_step, ahead, along) = arguments  # fmt: skip
        ahead_at = _four(builder, ahead)
        apart = LANES * (1 if w.dtype == types.float32 else 2)

        def of_columns(columns: int) -> Callable[[int], None]:
            def of_rows(rows: int) -> None:
                loop = _Loop(builder, x.dtype, w.dtype, _at(builder, x_array, x_at), x_step, w_step, rows, columns)
                into = _at(builder, sums, sums_at)
                before = builder.block
                body, after = builder.append_basic_block("part"), builder.append_basic_block("parts")
                first = loop.load(into, sums_step)
                builder.branch(body)
                builder.position_at_end(body)
                part = builder.phi(_I64)
                part.add_incoming(_int(0), before)
                totals = [[builder.phi(FLOATS) for _ in range(columns)] for _ in range(rows)]
                place = builder.load(_at(builder, places, part))
                start = builder.add(place, offset)
                w_at = [_at(builder, w_array, builder.add(start, _int(c * apart))) for c in range(columns)]
                done = builder.mul(part, count)
                line = builder.mul(builder.add(along, done), _int(_LINE_BYTES))
                sums_of = loop.run(totals, done, w_at, count, ahead_at, line, _int(_LINE_BYTES))
                following = builder.add(part, _int(1))
                part.add_incoming(following, builder.block)
                for r in range(rows):
                    for c in range(columns):
                        totals[r][c].add_incoming(first[r][c], before)
                        totals[r][c].add_incoming(sums_of[r][c], builder.block)
                builder.cbranch(builder.icmp_signed("<", following, number), body, after)
                builder.position_at_end(after)
                loop.store(sums_of, into, sums_step)

            return of_rows

        several_or_one(
            builder, num_columns, COLUMNS, lambda number: several_or_one(builder, num_rows, ROWS, of_columns(number))
        )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, x, types.intp, types.intp, w, _places, types.intp, types.intp, types.intp,
                      types.intp, _sums, types.intp, types.intp, _ahead, types.intp), build  # fmt: skip


def _at(builder: Any, pointer: Any, offset: Any) -> Any:
    return builder.gep(pointer, [offset])


def _four(builder: Any, integers: Any) -> list[Any]:
    return [builder.load(_at(builder, integers, _int(i))) for i in range(4)]


def several_or_one(builder: Any, number: Any, several: int, compute: Callable[[int], None]) -> None:
    """Code for so many at once, and code for one: `number` says which is run."""
    with builder.if_else(builder.icmp_signed("==", number, _int(several))) as (all_of_them, one):
        with all_of_them:
            compute(several)
        with one:
            compute(1)


class _Loop:
    """Over k: a vector of each block of columns is loaded, and meets the numbers of each row."""

    def __init__(
        self, builder: Any, x_type: Any, w_type: Any, x_at: Any, x_step: Any, w_step: Any, rows: int, columns: int
    ) -> None:
        self._builder, self._rows, self._columns = builder, rows, columns
        self._is_paired = w_type != types.float32
        self._is_dot = self._is_paired and x_type != types.float32
        self._x_at = [builder.gep(x_at, [builder.mul(x_step, _int(row))]) for row in range(rows)]
        self._w_step = w_step

    def run(
        self, first: Sequence[Sequence[Any]], done: Any, w_at: list[Any], count: Any, ahead: list[Any], line: Any,
        line_step: Any,
    ) -> list[list[Any]]:  # fmt: skip
        """The sums after `count` > 0 vectors, `first` those before; `done` vectors of the rows are past."""
        builder, places = self._builder, [(r, c) for r in range(self._rows) for c in range(self._columns)]
        has_lines = builder.icmp_signed("!=", ahead[0], _int(0))
        before = builder.block
        body, after = builder.append_basic_block("k"), builder.append_basic_block("sums")
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(_I64)
        k.add_incoming(_int(0), before)
        totals = [[builder.phi(FLOATS) for _ in range(self._columns)] for _ in range(self._rows)]
        offset = builder.mul(k, self._w_step)
        kind, align = (_PAIRS, 2) if self._is_paired else (FLOATS, 4)
        weights = [
            builder.load(builder.bitcast(builder.gep(at, [offset]), kind.as_pointer()), align=align) for at in w_at
        ]
        x_index = builder.add(done, k)
        sums = [self._add(row, x_index, weights, totals[row]) for row in range(self._rows)]
        with builder.if_then(has_lines):
            along = builder.add(line, builder.mul(k, line_step))
            for address in ahead:
                fetch_line(builder, builder.inttoptr(builder.add(address, along), _BYTE.as_pointer()))
        following = builder.add(k, _int(1))
        k.add_incoming(following, builder.block)
        for r, c in places:
            totals[r][c].add_incoming(first[r][c], before)
            totals[r][c].add_incoming(sums[r][c], builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return sums

    def _add(self, row: int, k: Any, weights: list[Any], totals: list[Any]) -> list[Any]:
        """The next sums of a row."""
        builder = self._builder
        if self._is_dot:
            pairs_at = builder.bitcast(self._x_at[row], _I32.as_pointer())
            both = splat_bits(builder, builder.load(builder.gep(pairs_at, [k]), align=4))
            return [add_dot(builder, weight, both, total) for weight, total in zip(weights, totals, strict=True)]
        for half in range(2 if self._is_paired else 1):
            index = builder.add(builder.mul(k, _int(2)), _int(half)) if self._is_paired else k
            number = spread_of(builder, builder.load(builder.gep(self._x_at[row], [index]), align=4))
            wide = [_half(builder, weight, half) for weight in weights] if self._is_paired else weights
            totals = [fma_of(builder, weight, number, total) for weight, total in zip(wide, totals, strict=True)]
        return totals

    def load(self, at: Any, step: Any) -> list[list[Any]]:
        """Sums from memory, rows `step` apart."""
        return [[self._builder.load(place, align=4) for place in row] for row in self._places(at, step)]

    def store(self, sums: list[list[Any]], at: Any, step: Any) -> None:
        """Write them there."""
        for of_row, places in zip(sums, self._places(at, step), strict=True):
            for one, place in zip(of_row, places, strict=True):
                self._builder.store(one, place, align=4)

    def _places(self, at: Any, step: Any) -> list[list[Any]]:
        builder = self._builder

        def place(row: int, column: int) -> Any:
            offset = builder.add(builder.mul(step, _int(row)), _int(column * LANES))
            return builder.bitcast(builder.gep(at, [offset]), FLOATS.as_pointer())

        return [[place(row, column) for column in range(self._columns)] for row in range(self._rows)]


def _half(builder: Any, pairs: Any, half: int) -> Any:
    """The first or the second bf16 of each pair, widened."""
    if half == 0:
        return builder.bitcast(builder.shl(pairs, ir.Constant(_PAIRS, [16] * LANES)), FLOATS)
    return builder.bitcast(builder.and_(pairs, ir.Constant(_PAIRS, [-(2**16)] * LANES)), FLOATS)


def fetch_line(builder: Any, address: Any) -> None:
    """To the second level; nothing waits for it, and any address will do."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), *[_I32] * 3])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, locality, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    builder.call(prefetch, [address, read, locality, data])


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


_ZERO = ir.Constant(FLOATS, [0.0] * LANES)
