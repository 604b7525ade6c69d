"""The inner loop of matmuls: some rows times one panel of weights, all sums in registers. Knows no matrix, no threads.

    panel [K / 2, 32, 2]          32 outputs side by side, two k of each together: 128 bytes a step, read in order
    rows  [R, K]     R ≤ 8        two k of a row are 32 bits, which meet all outputs
    sums  [R, 32]    float32      R · 2 vectors, each sum in one place from the first k to the last

Every sum is added up in ascending k, one after the other, whatever R is, whichever rows stand beside it and whichever
thread does it: so its bits are the same for any number of rows. It is written as LLVM's instructions because whether
sums stay in registers decides its speed, and no compiler promises that of loops.

Two arithmetics, of which one is chosen for good when a process starts, since their bits differ:
- FMA: both factors are widened, and each product is added with one rounding. The same bits on every CPU.
- DOT: the CPU's own dot product of bf16 pairs (AVX512-BF16, `vdpbf16ps`), twice as fast where sums are the bottleneck.

Measured on one core of a Zen 4, GMAC/s of [7168, 1024] with R = 1, 2, 4, 8: FMA 28, 53, 56, 57; DOT 114 with 8 rows and
105 for oneDNN. With 32 vectors' registers 6 to 14 rows are alike. With 16 registers two rows do 49 and four 17: they
no longer fit.
"""

from __future__ import annotations

from typing import Any

from experts_service.kernels.compiled.jit import AVAILABLE, cpu_has, intrinsic

FMA, DOT = 0, 1
WIDTH = 32  # outputs of a panel
PAIR = 2  # k that are read at once
_LANES = 16  # of a vector, as it is written here; where the CPU's are shorter LLVM splits it

HEIGHTS: tuple[int, ...] = (1, 2, 4, 8) if AVAILABLE and cpu_has("avx512f") else (1, 2)  # rows that fit the registers
HAS_DOT = AVAILABLE and cpu_has("avx512bf16")

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils, types

    class BFloat(ir.types.Type):  # type: ignore[misc]
        """LLVM's bf16, which llvmlite lacks."""

        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BFloat)

        def __hash__(self) -> int:
            return hash(BFloat)

    _i32, _i64, _f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    _Bits, _Floats, _Pairs = (ir.VectorType(one, _LANES) for one in (_i32, _f32, _i32))
    _BFloats = ir.VectorType(BFloat(), PAIR * _LANES)
    _VECTORS = WIDTH // _LANES


@intrinsic
def multiply_rows(
    _context: Any, _arithmetic: Any, _height: Any, _panel: Any, _rows: Any, _row_pairs: Any, _pairs: Any, _sums: Any
) -> Any:
    """`sums` [height, 32] = `rows` [height, `row_pairs` · 2] times `panel` [`pairs`, 32, 2].

    All are addresses, int64; `row_pairs` ≥ `pairs` ≥ 1 is how far rows are apart. `height` is one of HEIGHTS.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        arithmetic, height, panel, rows, row_pairs, pairs, sums = arguments
        done = builder.append_basic_block("done")
        for of_dot in (False, True) if HAS_DOT else (False,):
            wanted = builder.append_basic_block("arithmetic")
            other = builder.append_basic_block("other_arithmetic")
            builder.cbranch(builder.icmp_signed("==", arithmetic, _int(int(of_dot))), wanted, other)
            builder.position_at_end(wanted)
            for number in HEIGHTS:
                fits, next_height = (builder.append_basic_block(name) for name in ("height", "next_height"))
                builder.cbranch(builder.icmp_signed("==", height, _int(number)), fits, next_height)
                builder.position_at_end(fits)
                _loop(builder, of_dot, number, panel, rows, row_pairs, pairs, sums)
                builder.branch(done)
                builder.position_at_end(next_height)
            builder.branch(done)
            builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)

    return types.void(*[types.int64] * 7), build


def _loop(
    builder: Any, of_dot: bool, height: int, panel: Any, rows: Any, row_pairs: Any, pairs: Any, sums: Any
) -> None:
    """One loop over k for so many rows: two vectors of weights are loaded, each row's pair meets both."""
    before = builder.block
    body, after = builder.append_basic_block("k"), builder.append_basic_block("sums")
    weights_at = builder.inttoptr(panel, _Pairs.as_pointer())
    row_at = [
        builder.gep(builder.inttoptr(rows, _i32.as_pointer()), [builder.mul(row_pairs, _int(row))])
        for row in range(height)
    ]
    builder.branch(body)

    builder.position_at_end(body)
    pair = builder.phi(_i64)
    pair.add_incoming(_int(0), before)
    totals = [[builder.phi(_Floats) for _ in range(_VECTORS)] for _ in range(height)]
    first = builder.mul(pair, _int(_VECTORS))
    weights = [
        builder.load(builder.gep(weights_at, [builder.add(first, _int(vector))]), align=64)
        for vector in range(_VECTORS)
    ]
    step = add_dot if of_dot else add_fma
    for row in range(height):
        both = splat_bits(builder, builder.load(builder.gep(row_at[row], [pair]), align=4))
        for vector in range(_VECTORS):
            total = totals[row][vector]
            total.add_incoming(ir.Constant(_Floats, [0.0] * _LANES), before)
            total.add_incoming(step(builder, weights[vector], both, total), body)
    following = builder.add(pair, _int(1))
    pair.add_incoming(following, body)
    builder.cbranch(builder.icmp_signed("<", following, pairs), body, after)

    builder.position_at_end(after)
    sums_at = builder.inttoptr(sums, _Floats.as_pointer())
    for index, total in enumerate(total for of_row in totals for total in of_row):
        builder.store(total.incomings[1][0], builder.gep(sums_at, [_int(index)]), align=4)


def add_fma(builder: Any, weights: Any, row: Any, total: Any) -> Any:
    """total + both products of each pair, the lower k first."""
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_Floats, [_Floats] * 3), "llvm.fma.v16f32")
    for weight, number in zip(halves_of(builder, weights), halves_of(builder, row), strict=True):
        total = builder.call(fma, [weight, number, total])
    return total


def add_dot(builder: Any, weights: Any, row: Any, total: Any) -> Any:
    """total + both products of each pair, by the CPU's own instruction."""
    dot = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_Floats, [_Floats, _BFloats, _BFloats]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    return builder.call(dot, [total, builder.bitcast(weights, _BFloats), builder.bitcast(row, _BFloats)])


def halves_of(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """The first and the second bf16 of each pair, widened."""
    first = builder.shl(pairs, ir.Constant(_Bits, [16] * _LANES))
    second = builder.and_(pairs, ir.Constant(_Bits, [-(2**16)] * _LANES))
    return builder.bitcast(first, _Floats), builder.bitcast(second, _Floats)


def splat_bits(builder: Any, value: Any) -> Any:
    """The same value in all lanes."""
    first = builder.insert_element(ir.Constant(_Bits, ir.Undefined), value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(_Bits, [0] * _LANES))


def _int(value: int) -> Any:
    return ir.Constant(_i64, value)
