"""The inner loop of matmuls with weights of 8 or 4 bits: some rows times one panel. Knows no matrix, no threads.

    codes   of 8 bits  [K / 4, 32, 4]      32 outputs side by side, four k of each together
            of 4 bits  [K / 8, 32, 4]      the same, four k in the lower halves of bytes and the next four in the upper
    scales  [G, 32] bf16 or float32, zeros [G, 32] int16: of each group of k, whole blocks
    rows    [R]                            integers of 16 bits with a scale for each block of k: see quantized_rows.py
    sums    [R, 32] float32

Sums of a block are of integers, so they are exact in any order; blocks are added in float32 in ascending k, each with
one rounding. So the bits of a sum are the same for any number of rows, and on every CPU, whichever way it multiplies:
- DIGITS: a row's number is two bytes, and each is multiplied with the weights as they were stored (AVX512-VNNI,
  `vpdpbusd`): weights are not widened at all.
- else bytes of weights are taken apart into 16 bits, whose products are added in pairs (`vpmaddwd`, AVX2 and AVX512BW).

Two products of a byte are as fast as one of bf16. Four rows are the most whose sums stay in 32 registers.
"""

from __future__ import annotations

from typing import Any

from experts_service.kernels.compiled.jit import AVAILABLE, cpu_has, intrinsic
from experts_service.kernels.compiled.panel_loops import LANES, PanelLoops, call_one_of, flat, function_of, integer

STEP = 8  # k that are read at once: blocks are multiples of it
MAX_BLOCK = 128  # k whose sum fits 32 bits
OFFSETS = {8: 128, 4: 8}  # by bits: what is added to a code to store it without a sign

DIGITS = AVAILABLE and cpu_has("avx512vnni")
HEIGHTS: tuple[int, ...] = (1, 2, 4) if AVAILABLE and cpu_has("avx512f") else (1, 2)

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils, types

    from experts_service.kernels.compiled.panel_loops import VECTORS, Floats, Ints, Shorts

    _i16, _i32, _i64, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


@intrinsic
def multiply_rows(
    _context: Any,
    _bits: Any,
    _height: Any,
    _codes: Any,
    _scales: Any,
    _wide_scales: Any,
    _zeros: Any,
    _blocks: Any,
    _block: Any,
    _blocks_of_group: Any,
    _rows: Any,
    _row_words: Any,
    _sums: Any,
) -> Any:
    """`sums` [height, 32] = `rows` times a panel; all are int64, `codes` … `sums` addresses.

    `wide_scales`: 1 where scales are float32. `zeros`: 0 where all are `OFFSETS[bits]`. `block`: k of one of
    `blocks`, and `blocks_of_group` of them share a scale. `row_words`: how many int32 rows are apart.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        call_one_of(builder, tuple(OFFSETS), HEIGHTS, arguments, _function)

    return types.void(*[types.int64] * 12), build


def _function(module: Any, bits: int, height: int) -> Any:
    name = f"multiply_{height}_rows_with_{bits}_bits"
    return function_of(module, name, 10, lambda function: _Loops(function, bits, height).build())


class _Loops(PanelLoops):
    """Over the blocks of k, and in each over its steps."""

    def __init__(self, function: Any, bits: int, height: int) -> None:
        super().__init__(function, height)
        self.bits = bits
        (
            codes,
            self.scales_at,
            self.wide_scales,
            self.zeros,
            self.blocks,
            self.block,
            self.blocks_of_group,
            rows,
            row_words,
            sums,
        ) = function.args
        self.codes_at = self.pointer(codes, Ints)
        words = self.pointer(rows, _i32)
        self.row_at = [
            self.builder.gep(words, [self.builder.mul(row_words, integer(row))]) for row in range(self.height)
        ]
        self.sums_at = self.pointer(sums, Floats)

    def build(self) -> None:
        b = self.builder
        steps = b.udiv(self.block, integer(STEP))
        self.quads = b.udiv(self.block, integer(4))  # of a block; as many words of each digit
        self.words = b.mul(self.blocks, b.mul(self.quads, integer(2)))  # of a row, before its scales
        entry = b.block
        body, after = (self.function.append_basic_block(name) for name in ("block", "sums"))
        b.branch(body)

        b.position_at_end(body)
        block, group, of_group = (b.phi(_i64) for _ in range(3))
        totals = self.phis(Floats)
        for phi in (block, group, of_group):
            phi.add_incoming(integer(0), entry)
        for total in flat(totals):
            total.add_incoming(ir.Constant(Floats, [0.0] * LANES), entry)
        first_sums = self._first_sums(block, group)
        integers = self._steps(block, steps, first_sums)
        scales = self.scales(self.wide_scales, self.scales_at, group)
        for row in range(self.height):
            at = b.gep(self.row_at[row], [b.add(self.words, block)])
            of_row = self._splat(b.load(b.bitcast(at, _f32.as_pointer()), align=4), Floats)
            for vector in range(VECTORS):
                scale = b.fmul(scales[vector], of_row)  # a row's scale is a power of two: exact
                total = totals[row][vector]
                number = b.sitofp(integers[row][vector], Floats)
                total.add_incoming(self.fma(number, scale, total), b.block)
        here = b.block
        following = b.add(block, integer(1))
        num_of_group = b.add(of_group, integer(1))
        is_last = b.icmp_signed("==", num_of_group, self.blocks_of_group)
        block.add_incoming(following, here)
        group.add_incoming(b.add(group, b.zext(is_last, _i64)), here)
        of_group.add_incoming(b.select(is_last, integer(0), num_of_group), here)
        b.cbranch(b.icmp_signed("<", following, self.blocks), body, after)

        b.position_at_end(after)
        self.store_sums(self.sums_at, [[total.incomings[1][0] for total in of_row] for of_row in totals])

    def _first_sums(self, block: Any, group: Any) -> list[list[Any]]:
        """What zero points take from each sum."""
        b = self.builder
        has_zeros = b.zext(b.icmp_signed("!=", self.zeros, integer(0)), _i64)
        offset = ir.Constant(Ints, [OFFSETS[self.bits]] * LANES)
        zeros = self.either(has_zeros, group, self._zero_points, lambda _group: [offset] * VECTORS)
        first = []
        for row in range(self.height):
            of_row = b.load(b.gep(self.row_at[row], [b.add(b.add(self.words, self.blocks), block)]), align=4)
            spread = self._splat(b.neg(of_row), Ints)
            first.append([b.mul(zeros[vector], spread) for vector in range(VECTORS)])
        return first

    def _steps(self, block: Any, steps: Any, first: list[list[Any]]) -> list[list[Any]]:
        """Sums of one block, int32."""
        b = self.builder
        before = b.block
        body, after = (self.function.append_basic_block(name) for name in ("step", "end"))
        first_step = b.mul(block, steps)
        first_word = b.mul(block, b.mul(self.quads, integer(2)))
        b.branch(body)

        b.position_at_end(body)
        step = b.phi(_i64)
        step.add_incoming(integer(0), before)
        uppers = self.phis(Ints) if DIGITS else []
        lowers = self.phis(Ints)
        for upper in flat(uppers):
            upper.add_incoming(ir.Constant(Ints, [0] * LANES), before)
        for lower, start in zip(flat(lowers), flat(first), strict=True):
            lower.add_incoming(start, before)
        upper_sums, lower_sums = [list(of_row) for of_row in uppers], [list(of_row) for of_row in lowers]
        for quad, weights in enumerate(self._weights(b.add(first_step, step))):
            word = b.add(first_word, b.add(b.mul(step, integer(2)), integer(quad)))
            for row in range(self.height):
                at = b.gep(self.row_at[row], [word])
                one = self._splat(b.load(at, align=4), Ints)
                two = self._splat(b.load(b.gep(at, [self.quads]), align=4), Ints)
                for vector in range(VECTORS):
                    lower = lower_sums[row][vector]
                    if DIGITS:
                        upper = upper_sums[row][vector]
                        upper_sums[row][vector] = dot_bytes(b, upper, weights[vector], one)
                        lower_sums[row][vector] = dot_bytes(b, lower, weights[vector], two)
                    else:
                        lower_sums[row][vector] = dot_shorts(b, lower, weights[vector], one, two)
        here = b.block
        for phi, end in zip(flat(uppers + lowers), flat(upper_sums[: len(uppers)] + lower_sums), strict=True):
            phi.add_incoming(end, here)
        following = b.add(step, integer(1))
        step.add_incoming(following, here)
        b.cbranch(b.icmp_signed("<", following, steps), body, after)

        b.position_at_end(after)
        if not DIGITS:
            return lower_sums
        eight = ir.Constant(Ints, [8] * LANES)
        return [
            [b.add(b.shl(upper, eight), lower) for upper, lower in zip(*of_row, strict=True)]
            for of_row in zip(upper_sums, lower_sums, strict=True)
        ]

    def _weights(self, step: Any) -> list[list[Any]]:
        """Of both fours of k the vectors of weights, a byte each."""
        b = self.builder

        def load(index: Any, vector: int) -> Any:
            return b.load(b.gep(self.codes_at, [b.add(index, integer(vector))]), align=64)

        if self.bits == 8:
            starts = [b.mul(b.add(b.mul(step, integer(2)), integer(quad)), integer(VECTORS)) for quad in range(2)]
            return [[load(start, vector) for vector in range(VECTORS)] for start in starts]
        both = [load(b.mul(step, integer(VECTORS)), vector) for vector in range(VECTORS)]
        half, four = (ir.Constant(Ints, [value] * LANES) for value in (0x0F0F0F0F, 4))
        return [[b.and_(one, half) for one in both], [b.and_(b.lshr(one, four), half) for one in both]]

    def _zero_points(self, group: Any) -> list[Any]:
        return [self.builder.sext(one, Ints) for one in self.of_group(self.zeros, group, Shorts)]

    def _splat(self, value: Any, kind: Any) -> Any:
        """The same value in all lanes."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_i32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(Ints, [0] * LANES))


def dot_bytes(builder: Any, total: Any, weights: Any, row: Any) -> Any:
    """Each int32 of total + four bytes without a sign times four with one."""
    kind = ir.FunctionType(Ints, [Ints] * 3)
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(dot, [total, weights, row])


def dot_shorts(builder: Any, total: Any, weights: Any, even: Any, odd: Any) -> Any:
    """The same, the row being pairs of int16: of the first and third byte, and of the others."""
    low, eight = (ir.Constant(Ints, [value] * LANES) for value in (0x00FF00FF, 8))
    evens, odds = builder.and_(weights, low), builder.and_(builder.lshr(weights, eight), low)
    return builder.add(builder.add(total, _pairs(builder, evens, even)), _pairs(builder, odds, odd))


def _pairs(builder: Any, weights: Any, row: Any) -> Any:
    """Products of both int16 of each int32, added."""
    if cpu_has("avx512bw"):
        return _multiply_pairs(builder, "llvm.x86.avx512.pmaddw.d.512", [weights, row], LANES)
    if cpu_has("avx2"):
        halves = []
        for first in (0, LANES // 2):
            lanes = ir.Constant(ir.VectorType(_i32, 8), list(range(first, first + 8)))
            parts = [builder.shuffle_vector(one, one, lanes) for one in (weights, row)]
            halves.append(_multiply_pairs(builder, "llvm.x86.avx2.pmadd.wd", parts, 8))
        return builder.shuffle_vector(*halves, ir.Constant(Ints, list(range(LANES))))
    sixteen = ir.Constant(Ints, [16] * LANES)
    lower = [builder.ashr(builder.shl(one, sixteen), sixteen) for one in (weights, row)]
    upper = [builder.ashr(one, sixteen) for one in (weights, row)]
    return builder.add(builder.mul(*lower), builder.mul(*upper))


def _multiply_pairs(builder: Any, name: str, factors: list[Any], lanes: int) -> Any:
    shorts, ints = ir.VectorType(_i16, 2 * lanes), ir.VectorType(_i32, lanes)
    kind = ir.FunctionType(ints, [shorts, shorts])
    multiply = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(multiply, [builder.bitcast(one, shorts) for one in factors])
