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

WIDTH = 32  # outputs of a panel
STEP = 8  # k that are read at once: blocks are multiples of it
MAX_BLOCK = 128  # k whose sum fits 32 bits
OFFSETS = {8: 128, 4: 8}  # by bits: what is added to a code to store it without a sign
_LANES = 16

DIGITS = AVAILABLE and cpu_has("avx512vnni")
HEIGHTS: tuple[int, ...] = (1, 2, 4) if AVAILABLE and cpu_has("avx512f") else (1, 2)

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils, types

    _i16, _i32, _i64, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
    _Shorts, _Ints, _Floats = (ir.VectorType(one, _LANES) for one in (_i16, _i32, _f32))
    _VECTORS = WIDTH // _LANES


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
        bits, height, *rest = arguments
        done = builder.append_basic_block("done")
        for of_bits in OFFSETS:
            for number in HEIGHTS:
                wanted, other = builder.append_basic_block("wanted"), builder.append_basic_block("other")
                is_wanted = builder.and_(
                    builder.icmp_signed("==", bits, _int(of_bits)), builder.icmp_signed("==", height, _int(number))
                )
                builder.cbranch(is_wanted, wanted, other)
                builder.position_at_end(wanted)
                builder.call(_function(builder.module, of_bits, number), rest)
                builder.branch(done)
                builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)

    return types.void(*[types.int64] * 12), build


def _function(module: Any, bits: int, height: int) -> Any:
    """One for all places of a module that call it: else each compiles its own."""
    name = f"multiply_{height}_rows_with_{bits}_bits"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    _Loops(function, bits, height).build()
    return function


class _Loops:
    """Over the blocks of k, and in each over its steps."""

    def __init__(self, function: Any, bits: int, height: int) -> None:
        self.bits, self.height, self.function = bits, height, function
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        (
            codes,
            self.scales,
            self.wide_scales,
            self.zeros,
            self.blocks,
            self.block,
            self.blocks_of_group,
            rows,
            row_words,
            sums,
        ) = function.args
        self.codes_at = self._pointer(codes, _Ints)
        words = self._pointer(rows, _i32)
        self.row_at = [self.builder.gep(words, [self.builder.mul(row_words, _int(row))]) for row in range(self.height)]
        self.sums_at = self._pointer(sums, _Floats)

    def build(self) -> None:
        b = self.builder
        steps = b.udiv(self.block, _int(STEP))
        self.quads = b.udiv(self.block, _int(4))  # of a block; as many words of each digit
        self.words = b.mul(self.blocks, b.mul(self.quads, _int(2)))  # of a row, before its scales
        entry = b.block
        body, after = (self.function.append_basic_block(name) for name in ("block", "sums"))
        b.branch(body)

        b.position_at_end(body)
        block, group, of_group = (b.phi(_i64) for _ in range(3))
        totals = self._phis(_Floats)
        for phi in (block, group, of_group):
            phi.add_incoming(_int(0), entry)
        for total in _flat(totals):
            total.add_incoming(ir.Constant(_Floats, [0.0] * _LANES), entry)
        first_sums = self._first_sums(block, group)
        integers = self._steps(block, steps, first_sums)
        scales = self._vectors(self.wide_scales, group, self._float_scales, self._bf16_scales)
        for row in range(self.height):
            at = b.gep(self.row_at[row], [b.add(self.words, block)])
            of_row = self._splat(b.load(b.bitcast(at, _f32.as_pointer()), align=4), _Floats)
            for vector in range(_VECTORS):
                scale = b.fmul(scales[vector], of_row)  # a row's scale is a power of two: exact
                total = totals[row][vector]
                number = b.sitofp(integers[row][vector], _Floats)
                total.add_incoming(self._fma(number, scale, total), b.block)
        here = b.block
        following = b.add(block, _int(1))
        num_of_group = b.add(of_group, _int(1))
        is_last = b.icmp_signed("==", num_of_group, self.blocks_of_group)
        block.add_incoming(following, here)
        group.add_incoming(b.add(group, b.zext(is_last, _i64)), here)
        of_group.add_incoming(b.select(is_last, _int(0), num_of_group), here)
        b.cbranch(b.icmp_signed("<", following, self.blocks), body, after)

        b.position_at_end(after)
        for index, total in enumerate(_flat(totals)):
            b.store(total.incomings[1][0], b.gep(self.sums_at, [_int(index)]), align=4)
        b.ret_void()

    def _first_sums(self, block: Any, group: Any) -> list[list[Any]]:
        """What zero points take from each sum."""
        b = self.builder
        has_zeros = b.zext(b.icmp_signed("!=", self.zeros, _int(0)), _i64)
        offset = ir.Constant(_Ints, [OFFSETS[self.bits]] * _LANES)
        zeros = self._vectors(has_zeros, group, self._zero_points, lambda _group: [offset] * _VECTORS)
        first = []
        for row in range(self.height):
            of_row = b.load(b.gep(self.row_at[row], [b.add(b.add(self.words, self.blocks), block)]), align=4)
            spread = self._splat(b.neg(of_row), _Ints)
            first.append([b.mul(zeros[vector], spread) for vector in range(_VECTORS)])
        return first

    def _steps(self, block: Any, steps: Any, first: list[list[Any]]) -> list[list[Any]]:
        """Sums of one block, int32."""
        b = self.builder
        before = b.block
        body, after = (self.function.append_basic_block(name) for name in ("step", "end"))
        first_step = b.mul(block, steps)
        first_word = b.mul(block, b.mul(self.quads, _int(2)))
        b.branch(body)

        b.position_at_end(body)
        step = b.phi(_i64)
        step.add_incoming(_int(0), before)
        uppers = self._phis(_Ints) if DIGITS else []
        lowers = self._phis(_Ints)
        for upper in _flat(uppers):
            upper.add_incoming(ir.Constant(_Ints, [0] * _LANES), before)
        for lower, start in zip(_flat(lowers), _flat(first), strict=True):
            lower.add_incoming(start, before)
        upper_sums, lower_sums = [list(of_row) for of_row in uppers], [list(of_row) for of_row in lowers]
        for quad, weights in enumerate(self._weights(b.add(first_step, step))):
            word = b.add(first_word, b.add(b.mul(step, _int(2)), _int(quad)))
            for row in range(self.height):
                at = b.gep(self.row_at[row], [word])
                one = self._splat(b.load(at, align=4), _Ints)
                two = self._splat(b.load(b.gep(at, [self.quads]), align=4), _Ints)
                for vector in range(_VECTORS):
                    lower = lower_sums[row][vector]
                    if DIGITS:
                        upper = upper_sums[row][vector]
                        upper_sums[row][vector] = dot_bytes(b, upper, weights[vector], one)
                        lower_sums[row][vector] = dot_bytes(b, lower, weights[vector], two)
                    else:
                        lower_sums[row][vector] = dot_shorts(b, lower, weights[vector], one, two)
        here = b.block
        for phi, end in zip(_flat(uppers + lowers), _flat(upper_sums[: len(uppers)] + lower_sums), strict=True):
            phi.add_incoming(end, here)
        following = b.add(step, _int(1))
        step.add_incoming(following, here)
        b.cbranch(b.icmp_signed("<", following, steps), body, after)

        b.position_at_end(after)
        if not DIGITS:
            return lower_sums
        eight = ir.Constant(_Ints, [8] * _LANES)
        return [
            [b.add(b.shl(upper, eight), lower) for upper, lower in zip(*of_row, strict=True)]
            for of_row in zip(upper_sums, lower_sums, strict=True)
        ]

    def _weights(self, step: Any) -> list[list[Any]]:
        """Of both fours of k the vectors of weights, a byte each."""
        b = self.builder

        def load(index: Any, vector: int) -> Any:
            return b.load(b.gep(self.codes_at, [b.add(index, _int(vector))]), align=64)

        if self.bits == 8:
            starts = [b.mul(b.add(b.mul(step, _int(2)), _int(quad)), _int(_VECTORS)) for quad in range(2)]
            return [[load(start, vector) for vector in range(_VECTORS)] for start in starts]
        both = [load(b.mul(step, _int(_VECTORS)), vector) for vector in range(_VECTORS)]
        half, four = (ir.Constant(_Ints, [value] * _LANES) for value in (0x0F0F0F0F, 4))
        return [[b.and_(one, half) for one in both], [b.and_(b.lshr(one, four), half) for one in both]]

    def _vectors(self, flag: Any, group: Any, if_set: Any, otherwise: Any) -> list[Any]:
        """The vectors of a group that either of two makes, as a flag says when it runs."""
        b = self.builder
        names = ("set", "otherwise", "either")
        first, second, either = (self.function.append_basic_block(name) for name in names)
        b.cbranch(b.icmp_signed("!=", flag, _int(0)), first, second)
        made = []
        for block, make in ((first, if_set), (second, otherwise)):
            b.position_at_end(block)
            made.append((make(group), b.block))
            b.branch(either)
        b.position_at_end(either)
        vectors = []
        for vector in range(_VECTORS):
            phi = b.phi(made[0][0][vector].type)
            for of_block, block in made:
                phi.add_incoming(of_block[vector], block)
            vectors.append(phi)
        return vectors

    def _zero_points(self, group: Any) -> list[Any]:
        return [self.builder.sext(one, _Ints) for one in self._of_group(self.zeros, group, _Shorts)]

    def _float_scales(self, group: Any) -> list[Any]:
        return self._of_group(self.scales, group, _Floats)

    def _bf16_scales(self, group: Any) -> list[Any]:
        b, sixteen = self.builder, ir.Constant(_Ints, [16] * _LANES)
        wide = [b.zext(one, _Ints) for one in self._of_group(self.scales, group, _Shorts)]
        return [b.bitcast(b.shl(one, sixteen), _Floats) for one in wide]

    def _of_group(self, address: Any, group: Any, kind: Any) -> list[Any]:
        b = self.builder
        at, first = self._pointer(address, kind), b.mul(group, _int(_VECTORS))
        return [b.load(b.gep(at, [b.add(first, _int(vector))]), align=2) for vector in range(_VECTORS)]

    def _fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(_Floats, [_Floats] * 3)
        fma = cgutils.get_or_insert_function(self.function.module, kind, f"llvm.fma.v{_LANES}f32")
        return self.builder.call(fma, [a, b, c])

    def _splat(self, value: Any, kind: Any) -> Any:
        """The same value in all lanes."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_i32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(_Ints, [0] * _LANES))

    def _phis(self, kind: Any) -> list[list[Any]]:
        return [[self.builder.phi(kind) for _ in range(_VECTORS)] for _ in range(self.height)]

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())


def dot_bytes(builder: Any, total: Any, weights: Any, row: Any) -> Any:
    """Each int32 of total + four bytes without a sign times four with one."""
    kind = ir.FunctionType(_Ints, [_Ints] * 3)
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(dot, [total, weights, row])


def dot_shorts(builder: Any, total: Any, weights: Any, even: Any, odd: Any) -> Any:
    """The same, the row being pairs of int16: of the first and third byte, and of the others."""
    low, eight = (ir.Constant(_Ints, [value] * _LANES) for value in (0x00FF00FF, 8))
    evens, odds = builder.and_(weights, low), builder.and_(builder.lshr(weights, eight), low)
    return builder.add(builder.add(total, _pairs(builder, evens, even)), _pairs(builder, odds, odd))


def _pairs(builder: Any, weights: Any, row: Any) -> Any:
    """Products of both int16 of each int32, added."""
    if cpu_has("avx512bw"):
        return _multiply_pairs(builder, "llvm.x86.avx512.pmaddw.d.512", [weights, row], _LANES)
    if cpu_has("avx2"):
        halves = []
        for first in (0, _LANES // 2):
            lanes = ir.Constant(ir.VectorType(_i32, 8), list(range(first, first + 8)))
            parts = [builder.shuffle_vector(one, one, lanes) for one in (weights, row)]
            halves.append(_multiply_pairs(builder, "llvm.x86.avx2.pmadd.wd", parts, 8))
        return builder.shuffle_vector(*halves, ir.Constant(_Ints, list(range(_LANES))))
    sixteen = ir.Constant(_Ints, [16] * _LANES)
    lower = [builder.ashr(builder.shl(one, sixteen), sixteen) for one in (weights, row)]
    upper = [builder.ashr(one, sixteen) for one in (weights, row)]
    return builder.add(builder.mul(*lower), builder.mul(*upper))


def _multiply_pairs(builder: Any, name: str, factors: list[Any], lanes: int) -> Any:
    shorts, ints = ir.VectorType(_i16, 2 * lanes), ir.VectorType(_i32, lanes)
    kind = ir.FunctionType(ints, [shorts, shorts])
    multiply = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(multiply, [builder.bitcast(one, shorts) for one in factors])


def _flat(of_rows: list[list[Any]]) -> list[Any]:
    return [one for of_row in of_rows for one in of_row]


def _int(value: int) -> Any:
    return ir.Constant(_i64, value)
