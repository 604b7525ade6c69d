"""The inner loop of matmuls with FP8 weights (e4m3): some rows times one panel. Knows no matrix, no threads.

    codes   [K / 2, 32, 2]          32 outputs side by side (in the order ORDER), two k of each together, a byte each
    scales  [B, 32] bf16 or float32 of each block of k
    rows    [R, K]  bf16
    sums    [R, 32] float32

Codes are widened exactly, to a 256th of what they stand for: whoever packs scales multiplies them by 256. Where the CPU
looks up bytes among 128 (AVX512-VBMI) each code becomes a bf16, whose two bytes are looked up; else it is shifted by a
bit, which makes it a float16, and the CPU widens those (F16C).

Products are added up as in tile.py, by either arithmetic; then come the scales, blocks in ascending order, with one
rounding each. So the bits of a sum are the same for any number of rows, and with FMA on every CPU.

A code that is no number may be widened to 480: scales of its block have to be no numbers.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable, Sequence
from typing import Any

from experts_service.kernels.compiled.jit import AVAILABLE, cpu_has, intrinsic
from experts_service.kernels.compiled.tile import (
    DOT,
    FMA,
    HAS_DOT,
    HEIGHTS,
    PAIR,
    WIDTH,
    add_dot,
    add_fma,
    halves_of,
    splat_bits,
)

SCALE_FACTOR = 256  # of scales as they are packed
NOT_A_NUMBER = 0x7F  # of a code without its sign
_LANES = 16
_OCTETS = 64  # of a step
_QUARTER = 4  # outputs of a vector that lie together where bytes are looked up

_LOOKS_UP = AVAILABLE and cpu_has("avx512vbmi")
HAS_FLOAT8 = _LOOKS_UP or (AVAILABLE and (cpu_has("f16c") or platform.machine() == "aarch64"))
FLOAT8_ARITHMETICS: tuple[int, ...] = () if not HAS_FLOAT8 else (FMA, DOT) if _LOOKS_UP and HAS_DOT else (FMA,)
# Interleaving bytes keeps to quarters of a vector, so each has outputs of both vectors.
ORDER = (
    tuple(
        vector * _LANES + first + output
        for first in range(0, _LANES, _QUARTER)
        for vector in range(WIDTH // _LANES)
        for output in range(_QUARTER)
    )
    if _LOOKS_UP
    else tuple(range(WIDTH))
)

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils, types

    _i8, _i16, _i32, _i64, _f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
    _VECTORS = WIDTH // _LANES
    _Codes, _Octets = ir.VectorType(_i16, WIDTH), ir.VectorType(_i8, _OCTETS)
    _Halves = ir.VectorType(ir.HalfType(), _LANES)
    _Shorts, _Ints, _Floats = (ir.VectorType(one, _LANES) for one in (_i16, _i32, _f32))


@intrinsic
def multiply_float_rows(
    _context: Any,
    _arithmetic: Any,
    _height: Any,
    _codes: Any,
    _scales: Any,
    _wide_scales: Any,
    _blocks: Any,
    _block: Any,
    _rows: Any,
    _sums: Any,
) -> Any:
    """`sums` [height, 32] = `rows` [height, `blocks` · `block`] times a panel.

    All are int64; `codes`, `scales`, `rows` and `sums` are addresses. `arithmetic` is one of FLOAT8_ARITHMETICS,
    `height` of tile.HEIGHTS, `block` is even. `wide_scales`: 1 where scales are float32.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        arithmetic, height, *rest = arguments
        done = builder.append_basic_block("done")
        for of_arithmetic in FLOAT8_ARITHMETICS:
            for number in HEIGHTS:
                wanted, other = (builder.append_basic_block(name) for name in ("wanted", "other"))
                is_wanted = builder.and_(
                    builder.icmp_signed("==", arithmetic, _int(of_arithmetic)),
                    builder.icmp_signed("==", height, _int(number)),
                )
                builder.cbranch(is_wanted, wanted, other)
                builder.position_at_end(wanted)
                builder.call(_function(builder.module, of_arithmetic, number), rest)
                builder.branch(done)
                builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)

    return types.void(*[types.int64] * 9), build


def _function(module: Any, arithmetic: int, height: int) -> Any:
    """One for all places of a module that call it: else each compiles its own."""
    name = f"multiply_{height}_rows_with_float8_by_{arithmetic}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * 7), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    _Loops(function, arithmetic, height).build()
    return function


class _Loops:
    """Over the blocks of k, and in each over its pairs."""

    def __init__(self, function: Any, arithmetic: int, height: int) -> None:
        self._is_dot = arithmetic == DOT
        self._height = height
        self._function = function
        self._builder = ir.IRBuilder(function.append_basic_block("entry"))
        codes, self._scales, self._wide_scales, self._blocks, block, rows, sums = function.args
        b = self._builder
        self._pairs = b.udiv(block, _int(PAIR))
        words = b.inttoptr(rows, _i32.as_pointer())
        width = b.mul(self._blocks, self._pairs)
        self._row_at = [b.gep(words, [b.mul(width, _int(row))]) for row in range(height)]
        self._codes_at = b.inttoptr(codes, _Codes.as_pointer())
        self._sums_at = b.inttoptr(sums, _Floats.as_pointer())

    def build(self) -> None:
        b = self._builder
        entry = b.block
        body, after = (self._function.append_basic_block(name) for name in ("block", "sums"))
        b.branch(body)
        b.position_at_end(body)
        block = b.phi(_i64)
        block.add_incoming(_int(0), entry)
        totals = self._phis(entry)
        sums = self._products(block)
        scales = self._block_scales(block)
        ends = [
            [_fma(b, sums[row][vector], scales[vector], totals[row][vector]) for vector in range(_VECTORS)]
            for row in range(self._height)
        ]
        following = b.add(block, _int(1))
        self._close(totals, ends)
        block.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, self._blocks), body, after)
        b.position_at_end(after)
        for index, end in enumerate(one for of_row in ends for one in of_row):
            b.store(end, b.gep(self._sums_at, [_int(index)]), align=4)
        b.ret_void()

    def _products(self, block: Any) -> list[list[Any]]:
        """Sums of one block, without its scales."""
        b = self._builder
        first = b.mul(block, self._pairs)
        before = b.block
        body, after = (self._function.append_basic_block(name) for name in ("pair", "block_sums"))
        b.branch(body)
        b.position_at_end(body)
        step = b.phi(_i64)
        step.add_incoming(_int(0), before)
        totals = self._phis(before)
        pair = b.add(first, step)
        add = self._adder(b.load(b.gep(self._codes_at, [pair]), align=64))
        ends = []
        for row in range(self._height):
            both = splat_bits(b, b.load(b.gep(self._row_at[row], [pair]), align=4))
            ends.append([add(vector, both, totals[row][vector]) for vector in range(_VECTORS)])
        following = b.add(step, _int(1))
        self._close(totals, ends)
        step.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, self._pairs), body, after)
        b.position_at_end(after)
        return ends

    def _adder(self, codes: Any) -> Callable[[int, Any, Any], Any]:
        """What adds to a sum the products of a vector of codes with a row's pair."""
        b = self._builder
        if _LOOKS_UP:
            step = add_dot if self._is_dot else add_fma
            pairs = self._looked_up(b.bitcast(codes, _Octets))
            return lambda vector, both, total: step(b, pairs[vector], both, total)
        one, eight, kept = (ir.Constant(_Codes, [value] * WIDTH) for value in (1, 8, 0xBF80 - 2**16))
        halves = [b.and_(b.ashr(above, one), kept) for above in (b.shl(codes, eight), codes)]
        wide = [[self._widened(of_k, vector) for vector in range(_VECTORS)] for of_k in halves]

        def add(vector: int, both: Any, total: Any) -> Any:
            for of_k, number in zip(wide, halves_of(b, both), strict=True):
                total = _fma(b, of_k[vector], number, total)
            return total

        return add

    def _looked_up(self, octets: Any) -> list[Any]:
        """Pairs of bf16."""
        b = self._builder
        kind = ir.FunctionType(_Octets, [_Octets] * 3)
        look_up = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
        lower, upper = (
            b.call(look_up, [_constant(of_byte[:_OCTETS]), octets, _constant(of_byte[_OCTETS:])])
            for of_byte in zip(*map(_bf16, range(2 * _OCTETS)), strict=True)
        )
        upper = b.or_(upper, b.and_(octets, _constant([-128] * _OCTETS)))
        pairs = []
        for start in (0, 8):  # of sixteen bytes the lower or the upper half
            places = [
                place
                for sixteen in range(start, _OCTETS, 16)
                for octet in range(sixteen, sixteen + 8)
                for place in (octet, _OCTETS + octet)
            ]
            lanes = ir.Constant(ir.VectorType(_i32, _OCTETS), places)
            pairs.append(b.bitcast(b.shuffle_vector(lower, upper, lanes), _Ints))
        return pairs

    def _widened(self, halves: Any, vector: int) -> Any:
        b = self._builder
        lanes = ir.Constant(ir.VectorType(_i32, _LANES), list(range(vector * _LANES, (vector + 1) * _LANES)))
        part = b.shuffle_vector(halves, halves, lanes)
        return b.fpext(b.bitcast(part, _Halves), _Floats)

    def _block_scales(self, block: Any) -> list[Any]:
        """Of either kind, as float32."""
        b = self._builder
        wide, narrow, either = (self._function.append_basic_block(name) for name in ("wide", "narrow", "scales"))
        first = b.mul(block, _int(_VECTORS))
        b.cbranch(b.icmp_signed("!=", self._wide_scales, _int(0)), wide, narrow)
        made = []
        for place, kind in ((wide, _Floats), (narrow, _Shorts)):
            b.position_at_end(place)
            at = b.inttoptr(self._scales, kind.as_pointer())
            loaded = [b.load(b.gep(at, [b.add(first, _int(vector))]), align=2) for vector in range(_VECTORS)]
            if kind is _Shorts:
                sixteen = ir.Constant(_Ints, [16] * _LANES)
                loaded = [b.bitcast(b.shl(b.zext(one, _Ints), sixteen), _Floats) for one in loaded]
            made.append((loaded, b.block))
            b.branch(either)
        b.position_at_end(either)
        scales = []
        for vector in range(_VECTORS):
            phi = b.phi(_Floats)
            for loaded, place in made:
                phi.add_incoming(loaded[vector], place)
            scales.append(phi)
        return scales

    def _phis(self, before: Any) -> list[list[Any]]:
        """A sum for each row and vector, 0 at first."""
        totals = [[self._builder.phi(_Floats) for _ in range(_VECTORS)] for _ in range(self._height)]
        for total in (one for of_row in totals for one in of_row):
            total.add_incoming(ir.Constant(_Floats, [0.0] * _LANES), before)
        return totals

    def _close(self, totals: list[list[Any]], ends: list[list[Any]]) -> None:
        for of_row, ends_of_row in zip(totals, ends, strict=True):
            for total, end in zip(of_row, ends_of_row, strict=True):
                total.add_incoming(end, self._builder.block)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_Floats, [_Floats] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")
    return builder.call(fma, [a, b, c])


def _bf16(code: int) -> tuple[int, int]:
    """Lower and upper byte of a 256th of what a code without a sign stands for."""
    exponent, fraction = code >> 3, code & 7
    value = (fraction / 8 if exponent == 0 else 1 + fraction / 8) * 2.0 ** (max(exponent, 1) - 7)
    _, _, lower, upper = struct.pack("<f", value / SCALE_FACTOR)
    return lower, upper


def _constant(octets: Sequence[int]) -> Any:
    return ir.Constant(_Octets, list(octets))


def _int(value: int) -> Any:
    return ir.Constant(_i64, value)
