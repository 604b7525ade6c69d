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
from experts_service.kernels.compiled.panel_loops import LANES, PanelLoops, call_one_of, flat, function_of, integer
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
_OCTETS = 64  # of a step
_QUARTER = 4  # outputs of a vector that lie together where bytes are looked up

_LOOKS_UP = AVAILABLE and cpu_has("avx512vbmi")
HAS_FLOAT8 = _LOOKS_UP or (AVAILABLE and (cpu_has("f16c") or platform.machine() == "aarch64"))
FLOAT8_ARITHMETICS: tuple[int, ...] = () if not HAS_FLOAT8 else (FMA, DOT) if _LOOKS_UP and HAS_DOT else (FMA,)
# Interleaving bytes keeps to quarters of a vector, so each has outputs of both vectors.
ORDER = (
    tuple(
        vector * LANES + first + output
        for first in range(0, LANES, _QUARTER)
        for vector in range(WIDTH // LANES)
        for output in range(_QUARTER)
    )
    if _LOOKS_UP
    else tuple(range(WIDTH))
)

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils, types

    from experts_service.kernels.compiled.panel_loops import VECTORS, Floats, Ints

    _i8, _i16, _i32, _i64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
    _Codes, _Octets = ir.VectorType(_i16, WIDTH), ir.VectorType(_i8, _OCTETS)
    _Halves = ir.VectorType(ir.HalfType(), LANES)


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
        call_one_of(builder, FLOAT8_ARITHMETICS, HEIGHTS, arguments, _function)

    return types.void(*[types.int64] * 9), build


def _function(module: Any, arithmetic: int, height: int) -> Any:
    name = f"multiply_{height}_rows_with_float8_by_{arithmetic}"
    return function_of(module, name, 7, lambda function: _Loops(function, arithmetic, height).build())


class _Loops(PanelLoops):
    """Over the blocks of k, and in each over its pairs."""

    def __init__(self, function: Any, arithmetic: int, height: int) -> None:
        super().__init__(function, height)
        self._is_dot = arithmetic == DOT
        codes, self._scales_at, self._wide_scales, self._blocks, block, rows, sums = function.args
        b = self.builder
        self._pairs = b.udiv(block, integer(PAIR))
        words = b.inttoptr(rows, _i32.as_pointer())
        width = b.mul(self._blocks, self._pairs)
        self._row_at = [b.gep(words, [b.mul(width, integer(row))]) for row in range(height)]
        self._codes_at = b.inttoptr(codes, _Codes.as_pointer())
        self._sums_at = b.inttoptr(sums, Floats.as_pointer())

    def build(self) -> None:
        b = self.builder
        entry = b.block
        body, after = (self.function.append_basic_block(name) for name in ("block", "sums"))
        b.branch(body)
        b.position_at_end(body)
        block = b.phi(_i64)
        block.add_incoming(integer(0), entry)
        totals = self._sums_before(entry)
        sums = self._products(block)
        scales = self.scales(self._wide_scales, self._scales_at, block)
        ends = [
            [self.fma(sums[row][vector], scales[vector], totals[row][vector]) for vector in range(VECTORS)]
            for row in range(self.height)
        ]
        following = b.add(block, integer(1))
        self._close(totals, ends)
        block.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, self._blocks), body, after)
        b.position_at_end(after)
        self.store_sums(self._sums_at, ends)

    def _products(self, block: Any) -> list[list[Any]]:
        """Sums of one block, without its scales."""
        b = self.builder
        first = b.mul(block, self._pairs)
        before = b.block
        body, after = (self.function.append_basic_block(name) for name in ("pair", "block_sums"))
        b.branch(body)
        b.position_at_end(body)
        step = b.phi(_i64)
        step.add_incoming(integer(0), before)
        totals = self._sums_before(before)
        pair = b.add(first, step)
        add = self._adder(b.load(b.gep(self._codes_at, [pair]), align=64))
        ends = []
        for row in range(self.height):
            both = splat_bits(b, b.load(b.gep(self._row_at[row], [pair]), align=4))
            ends.append([add(vector, both, totals[row][vector]) for vector in range(VECTORS)])
        following = b.add(step, integer(1))
        self._close(totals, ends)
        step.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, self._pairs), body, after)
        b.position_at_end(after)
        return ends

    def _adder(self, codes: Any) -> Callable[[int, Any, Any], Any]:
        """What adds to a sum the products of a vector of codes with a row's pair."""
        b = self.builder
        if _LOOKS_UP:
            step = add_dot if self._is_dot else add_fma
            pairs = self._looked_up(b.bitcast(codes, _Octets))
            return lambda vector, both, total: step(b, pairs[vector], both, total)
        one, eight, kept = (ir.Constant(_Codes, [value] * WIDTH) for value in (1, 8, 0xBF80 - 2**16))
        halves = [b.and_(b.ashr(above, one), kept) for above in (b.shl(codes, eight), codes)]
        wide = [[self._widened(of_k, vector) for vector in range(VECTORS)] for of_k in halves]

        def add(vector: int, both: Any, total: Any) -> Any:
            for of_k, number in zip(wide, halves_of(b, both), strict=True):
                total = self.fma(of_k[vector], number, total)
            return total

        return add

    def _looked_up(self, octets: Any) -> list[Any]:
        """Pairs of bf16."""
        b = self.builder
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
            pairs.append(b.bitcast(b.shuffle_vector(lower, upper, lanes), Ints))
        return pairs

    def _widened(self, halves: Any, vector: int) -> Any:
        b = self.builder
        lanes = ir.Constant(ir.VectorType(_i32, LANES), list(range(vector * LANES, (vector + 1) * LANES)))
        part = b.shuffle_vector(halves, halves, lanes)
        return b.fpext(b.bitcast(part, _Halves), Floats)

    def _sums_before(self, before: Any) -> list[list[Any]]:
        """A sum for each row and vector, 0 at first."""
        totals = self.phis(Floats)
        for total in flat(totals):
            total.add_incoming(ir.Constant(Floats, [0.0] * LANES), before)
        return totals

    def _close(self, totals: list[list[Any]], ends: list[list[Any]]) -> None:
        for of_row, ends_of_row in zip(totals, ends, strict=True):
            for total, end in zip(of_row, ends_of_row, strict=True):
                total.add_incoming(end, self.builder.block)


def _bf16(code: int) -> tuple[int, int]:
    """Lower and upper byte of a 256th of what a code without a sign stands for."""
    exponent, fraction = code >> 3, code & 7
    value = (fraction / 8 if exponent == 0 else 1 + fraction / 8) * 2.0 ** (max(exponent, 1) - 7)
    _, _, lower, upper = struct.pack("<f", value / SCALE_FACTOR)
    return lower, upper


def _constant(octets: Sequence[int]) -> Any:
    return ir.Constant(_Octets, list(octets))
