# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-redef,no-untyped-call"
"""Triton's kernels of products of rows with matrices. Imported where they are started: Triton takes a second.

A program computes a tile of outputs × rows, so outputs are what a tensor core has many of, and small numbers become
the rows' dtype in registers. k is in ascending order, in blocks of one size and parts of one size, whatever the number
of rows: so a row's bits do not depend on what else is in the batch, nor on the tile it falls into. Parts are added by
the program itself, or, where there are few, by `add_parts`, in the same order.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from experts_service.kernels.gpu import matrices

PLAIN = tl.constexpr(matrices.PLAIN)
INT4 = tl.constexpr(matrices.INT4)
FLOAT8 = tl.constexpr(matrices.FLOAT8)
HALF = tl.constexpr(matrices.HALF)
IS_COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


# Four bytes to four numbers in bf16, of which a register holds two. The interpreter knows no PTX: it does what else is
# done in `_numbers`.
# Bits 0x4300 and 4 more are 128 and those: less 128 and what stands for 0, both exact.
_LOW_HALVES = tl.constexpr("""{
    .reg .b32 codes, one;
    mov.b32 one, 0x3f803f80;
    and.b32 codes, $2, 0x0f0f0f0f;
    prmt.b32 $0, codes, 0x43434343, 0x4140;
    prmt.b32 $1, codes, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, $3;
    fma.rn.bf16x2 $1, $1, one, $4;
}""")
# The bits of FP8 (e4m3) behind bf16's sign and first four bits of its exponent are the number times 2^-120, subnormals
# too; times 2^112 it is what the scales are made for.
_FLOAT8_BYTES = tl.constexpr("""{
    .reg .b32 high, low, zeros, minus_zeros, factors;
    mov.b32 zeros, 0;
    mov.b32 minus_zeros, 0x80008000;
    mov.b32 factors, 0x77807780;
    prmt.b32 low, $2, zeros, 0x1404;
    prmt.b32 high, $2, zeros, 0x3424;
    shr.u32 $0, low, 4;
    shr.u32 $1, high, 4;
    and.b32 $0, $0, 0x07f007f0;
    and.b32 $1, $1, 0x07f007f0;
    lop3.b32 $0, low, 0x80008000, $0, 0xea;
    lop3.b32 $1, high, 0x80008000, $1, 0xea;
    fma.rn.bf16x2 $0, $0, factors, minus_zeros;
    fma.rn.bf16x2 $1, $1, factors, minus_zeros;
}""")


@triton.jit
def _numbers(
    codes, zero, has_zeros: tl.constexpr, is_upper: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Codes [N, K] less what stands for 0 [N, 1], exactly; of 4 bits those in the lower halves, or the upper."""
    if kind == FLOAT8:
        if IS_COMPILED and dtype == tl.bfloat16:
            numbers = tl.inline_asm_elementwise(
                _FLOAT8_BYTES, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            codes = codes.to(tl.int16)
            bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
            numbers = bits.to(tl.float16, bitcast=True).to(tl.float32).to(dtype)
    elif kind == INT4:
        if is_upper:
            codes = codes >> 4
        if IS_COMPILED and dtype == tl.bfloat16:
            less = tl.zeros(codes.shape, tl.bfloat16) - (zero + 128).to(tl.float32).to(tl.bfloat16)
            numbers = tl.inline_asm_elementwise(
                _LOW_HALVES, "=r,=r,r,r,r", [codes, less], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            numbers = ((codes & 15).to(tl.int8) - zero).to(dtype)
    elif has_zeros:
        numbers = (codes.to(tl.float32) - zero.to(tl.float32)).to(dtype)
    else:
        numbers = codes.to(dtype)
    return numbers


@triton.jit
def _zero(zeros, at, kind: tl.constexpr):
    """What stands for 0: of each output [N, 1], or of all."""
    if zeros is not None:
        zero = tl.load(zeros + at)[:, None]
    else:
        zero: tl.constexpr = 8 if kind == INT4 else 0
    return zero


@triton.jit
def _inputs(x_rows, k, columns, in_features: tl.constexpr, is_whole: tl.constexpr):
    """[K, M] of some rows."""
    if columns is not None:
        k = tl.load(columns + k)
    if is_whole:
        x = tl.load(x_rows[None, :] + k[:, None])
    else:
        x = tl.load(x_rows[None, :] + k[:, None], mask=k[:, None] < in_features, other=0.0)
    return x


@triton.jit
def _product(
    weight_rows, at, zero, low, high, sums,
    in_features: tl.constexpr, is_whole: tl.constexpr, has_zeros: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """`sums` [N, M] and what a block of k adds to it."""
    if kind == PLAIN:
        if is_whole:
            weights = tl.load(weight_rows[:, None] + at[None, :])
        else:
            weights = tl.load(weight_rows[:, None] + at[None, :], mask=at[None, :] < in_features, other=0.0)
        sums = tl.dot(weights, low, sums, input_precision="ieee")
    else:
        codes = tl.load(weight_rows[:, None] + at[None, :])
        if kind == INT4:
            lower = _numbers(codes, zero, has_zeros, False, kind, low.dtype)
            upper = _numbers(codes, zero, has_zeros, True, kind, low.dtype)
            sums = tl.dot(lower, low, sums, input_precision="ieee")
            sums = tl.dot(upper, high, sums, input_precision="ieee")
        else:
            numbers = _numbers(codes, zero, has_zeros, False, kind, low.dtype)
            sums = tl.dot(numbers, low, sums, input_precision="ieee")
    return sums


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """silu(gate) · up, rounded where the reference rounds."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)


@triton.jit
def _part(
    x_rows,
    gate_rows,
    up_rows,
    scales,
    zeros,
    of_scales,
    columns,
    part,
    out_features: tl.constexpr,
    in_features: tl.constexpr,
    width: tl.constexpr,
    k_of_part: tl.constexpr,
    k_of_group: tl.constexpr,
    kind: tl.constexpr,
    gated: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    block: tl.constexpr,
):
    """What one part of k adds up to: gate and up [N, M], the latter zeros where there is none."""
    halves: tl.constexpr = 2 if gated else 1
    is_whole: tl.constexpr = width % block == 0 if kind == PLAIN else in_features == width
    at_once: tl.constexpr = block // 2 if kind == INT4 else block
    # Not tl.cdiv: in Triton 3.6 what it makes of two constants is none.
    blocks: tl.constexpr = (width + block - 1) // block
    gate = tl.zeros((tile_outputs, tile_rows), tl.float32)
    up = gate
    for index in range(part * (k_of_part // block), tl.minimum((part + 1) * (k_of_part // block), blocks)):
        at = index * at_once + tl.arange(0, at_once)
        if kind == INT4:
            k = at // HALF * (2 * HALF) + at % HALF
            low = _inputs(x_rows, k, columns, in_features, is_whole)
            high = _inputs(x_rows, k + HALF, columns, in_features, is_whole)
        else:
            low = _inputs(x_rows, at, columns, in_features, is_whole)
            high = low
        if k_of_group:
            of_group = of_scales + index // (k_of_group // block) * halves * out_features
            nothing = tl.zeros((tile_outputs, tile_rows), tl.float32)
            zero = _zero(zeros, of_group, kind)
            sums = _product(gate_rows, at, zero, low, high, nothing, in_features, is_whole, zeros is not None, kind)
            gate += sums * tl.load(scales + of_group).to(tl.float32)[:, None]
            if gated:
                of_group += out_features
                zero = _zero(zeros, of_group, kind)
                sums = _product(up_rows, at, zero, low, high, nothing, in_features, is_whole, zeros is not None, kind)
                up += sums * tl.load(scales + of_group).to(tl.float32)[:, None]
        else:
            zero = _zero(zeros, of_scales, kind)
            gate = _product(gate_rows, at, zero, low, high, gate, in_features, is_whole, zeros is not None, kind)
            if gated:
                zero = _zero(zeros, of_scales + out_features, kind)
                up = _product(up_rows, at, zero, low, high, up, in_features, is_whole, zeros is not None, kind)
    if kind != PLAIN and not k_of_group:
        gate *= tl.load(scales + of_scales).to(tl.float32)[:, None]
        if gated:
            up *= tl.load(scales + of_scales + out_features).to(tl.float32)[:, None]
    return gate, up


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x,  # [R, K]
    weights,  # [E, N, …], gated [E, 2 N, …]: see matrices.py, and for the next three
    scales,
    zeros,
    columns,
    ends,  # [E] int32: where each matrix' rows end; None: all are of one
    y,  # [R, N], or of parts [P, R, N] fp32, gated [P, R, 2 N]
    num_rows,
    num_matrices: tl.constexpr,
    out_features: tl.constexpr,  # N
    in_features: tl.constexpr,  # K
    width: tl.constexpr,  # K'
    k_of_part: tl.constexpr,
    k_of_group: tl.constexpr,  # that share a scale; 0: all
    kind: tl.constexpr,
    gated: tl.constexpr,
    parts: tl.constexpr,
    split: tl.constexpr,  # a part a program
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    block: tl.constexpr,  # k that are multiplied at once
    tiles_together: tl.constexpr,  # of rows, whose outputs are computed at about the same time
) -> None:
    """A tile of `y`.

    Programs run about in their order, so neighbours are to share rows, or outputs: some tiles of rows go through all
    outputs before the next do, and what they read is found in the card's cache.
    """
    output_tiles: tl.constexpr = (out_features + tile_outputs - 1) // tile_outputs
    program = tl.program_id(0)
    first_tile = program // (tiles_together * output_tiles) * tiles_together
    tiles = tl.minimum(tl.num_programs(0) // output_tiles - first_tile, tiles_together)
    place = program % (tiles_together * output_tiles)
    tile = first_tile + place % tiles
    expert = 0
    first, end = tile * tile_rows, num_rows
    if ends is not None:
        many: tl.constexpr = triton.next_power_of_2(num_matrices)
        each = tl.arange(0, many)
        end_of = tl.load(ends + each, mask=each < num_matrices, other=0)
        start_of = tl.load(ends + each - 1, mask=(each > 0) & (each < num_matrices), other=0)
        tiles_of = tl.cdiv(tl.where(each < num_matrices, end_of - start_of, 0), tile_rows)
        tiles_end = tl.cumsum(tiles_of, 0)
        expert = tl.sum((tiles_end <= tile).to(tl.int32), 0)
        if expert >= num_matrices:
            return  # one too many: the grid is made for the worst case
        mine = each == expert
        first = tl.sum(tl.where(mine, start_of + (tile - tiles_end + tiles_of) * tile_rows, 0), 0)
        end = tl.sum(tl.where(mine, end_of, 0), 0)
    halves: tl.constexpr = 2 if gated else 1
    bytes_of_row: tl.constexpr = width // 2 if kind == INT4 else width
    groups: tl.constexpr = (width + k_of_group - 1) // k_of_group if k_of_group else 1

    row = first + tl.arange(0, tile_rows)
    x_rows = x + tl.minimum(row, end - 1).to(tl.int64) * in_features  # [M]
    output = place // tiles * tile_outputs + tl.arange(0, tile_outputs)
    read = tl.minimum(output, out_features - 1)
    expert = tl.cast(expert, tl.int64)
    gate_rows = weights + (expert * halves * out_features + read) * bytes_of_row  # [N]
    up_rows = gate_rows + tl.cast(out_features, tl.int64) * bytes_of_row
    of_scales = expert * groups * halves * out_features + read
    if columns is not None:
        columns += expert * width

    first_part = tl.program_id(1) if split else 0
    gate, up = _part(
        x_rows, gate_rows, up_rows, scales, zeros, of_scales, columns, first_part, out_features, in_features, width,
        k_of_part, k_of_group, kind, gated, tile_rows, tile_outputs, block,
    )  # fmt: skip
    if not split:
        for part in range(1, parts):
            more_gate, more_up = _part(
                x_rows, gate_rows, up_rows, scales, zeros, of_scales, columns, part, out_features, in_features, width,
                k_of_part, k_of_group, kind, gated, tile_rows, tile_outputs, block,
            )  # fmt: skip
            gate += more_gate
            up += more_up

    is_written = (output < out_features)[:, None] & (row < end)[None, :]
    if split:
        at = (first_part * num_rows + row).to(tl.int64)[None, :] * (halves * out_features) + output[:, None]
        tl.store(y + at, gate, mask=is_written)
        if gated:
            tl.store(y + at + out_features, up, mask=is_written)
    else:
        if gated:
            gate = _gated(gate, up, y.dtype.element_ty)
        at = row.to(tl.int64)[None, :] * out_features + output[:, None]
        tl.store(y + at, gate.to(y.dtype.element_ty), mask=is_written)


@triton.jit(do_not_specialize=["num_rows"])
def add_parts(
    sums,  # [P, R, N] fp32, gated [P, R, 2 N]
    y,  # [R, N]
    num_rows,
    out_features: tl.constexpr,  # N
    gated: tl.constexpr,
    parts: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """Rows of the programs that had none are not numbers, here as there."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * size + tl.arange(0, size)
    is_there = output < out_features
    halves: tl.constexpr = 2 if gated else 1
    total = tl.zeros((size,), tl.float32)
    up = total
    for part in range(parts):
        at = sums + (tl.cast(part, tl.int64) * num_rows + row) * (halves * out_features) + output
        total += tl.load(at, mask=is_there, other=0.0)
        if gated:
            up += tl.load(at + out_features, mask=is_there, other=0.0)
    if gated:
        total = _gated(total, up, y.dtype.element_ty)
    tl.store(y + row * out_features + output, total.to(y.dtype.element_ty), mask=is_there)


KERNELS: dict[str, Any] = {"multiply": multiply, "add_parts": add_parts}
