"""Matmuls of bf16 rows with packed weights of 8 or 4 bits, on a CPU. Knows panels and rows; knows no layer.

    jobs    [J, 8]    of each matrix: see `_Job`
    rows    [R]       integers (see quantized_rows.py) for integers; for FP8 as they are
    y       [R, out]  bf16, each sum is rounded once

Many rows are multiplied as few are: bytes are multiplied as fast as bf16, so nothing is widened for them, and a row has
the same bits in any batch. FP8 is widened in registers (see float8_tile.py), for up to eight rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.compiled import quantized_rows, tile
from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.float8_tile import (
    FLOAT8_ARITHMETICS,
    HAS_FLOAT8,
    NOT_A_NUMBER,
    ORDER,
    SCALE_FACTOR,
    multiply_float_rows,
)
from experts_service.kernels.compiled.jit import AVAILABLE, kernel, pointer
from experts_service.kernels.compiled.matmul import RUN_BYTES, height_of, write_gated, write_sums
from experts_service.kernels.compiled.quantized_rows import quantize_task, row_words
from experts_service.kernels.compiled.quantized_tile import HEIGHTS, MAX_BLOCK, OFFSETS, STEP, multiply_rows
from experts_service.kernels.compiled.routine import Routine, Task, num_threads, take_run
from experts_service.kernels.compiled.tile import WIDTH
from experts_service.memory import mapped
from experts_service.quantization.groups import group_width, grouped_columns
from experts_service.quantization.weight import QuantizedWeight, Weight

if AVAILABLE:
    from numba import carray

_HIGHEST, _HIGHEST_OF_FLOATS = HEIGHTS[-1], tile.HEIGHTS[-1]
_FLOAT8 = -8  # in place of bits of integers
_CODES, _SCALES, _WIDE_SCALES, _ZEROS, _BITS, _BLOCKS_OF_GROUP, _FIRST_ROW, _NUM_ROWS, JOB = range(9)  # of a job
_MOST_PADDED = 2  # times the inputs: groups of very different sizes are not filled up to the largest
_DIGITS = 2  # of each number of a row: it is multiplied twice


@dataclass(frozen=True, slots=True)
class QuantizedPanels:
    """A matrix [out, in] as kernels read it: zeros make up the last panel and the last block of k."""

    codes: Tensor  # [P, bytes] uint8
    scales: Tensor  # [P, G, 32] bf16 where that is exact, else fp32
    zeros: Tensor | None  # [P, G, 32] int16, what stands for 0 in `codes`; None: OFFSETS
    bits: int  # of integers, or _FLOAT8
    block: int  # k that are summed as integers, or without scales
    blocks: int  # of a row
    blocks_of_group: int
    columns: Tensor | None  # [K] int64: the input of each k, where groups are not neighbours; `in_features`: none
    out_features: int
    in_features: int
    arithmetic: int = tile.FMA  # of FP8

    @property
    def layout(self) -> tuple[int, int, bool]:
        """What matrices of one call have alike: how rows are cut, and whether these are the rows of FP8."""
        return self.block, self.blocks, self.bits == _FLOAT8

    @property
    def row_words(self) -> int:
        """How many int32 a row takes that is multiplied with it."""
        return self.block * self.blocks // 2 if self.bits == _FLOAT8 else row_words(self.block, self.blocks)

    @property
    def job(self) -> tuple[int, ...]:
        """The first six fields of one with this matrix."""
        return (
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            self.scales.dtype is torch.float32,
            0 if self.zeros is None else self.zeros.data_ptr(),
            self.bits,
            self.blocks_of_group,
        )

    @classmethod
    def pack(cls, weight: QuantizedWeight, *, gate_up: bool = False, arithmetic: int | None = None) -> QuantizedPanels:
        """A copy of `weight` [out, in], which `is_multiplied_here`.

        `gate_up`: it is w1 above w3, and their panels take turns. `arithmetic`: tile.py's, of
        bf16 and so of FP8; None: a library multiplies bf16.
        """
        load_kernels()  # here: a model that is not quantised does without them
        if weight.codes.dtype is not torch.int8:
            return cls._pack_floats(weight, gate_up, arithmetic)
        columns, group = _columns(weight)
        block, blocks = _blocks(weight)
        codes = weight.codes if columns is None else F.pad(weight.codes, (0, 1))[:, columns]
        codes = F.pad(codes, (0, block * blocks - codes.shape[1])).view(torch.uint8) + OFFSETS[weight.bits]
        width = block * blocks
        panels = _panels(codes, gate_up)  # [P, 32, K]
        if weight.bits == 8:
            fours = panels.view(-1, WIDTH, width // 4, 4)
        else:
            lower, upper = panels.view(-1, WIDTH, width // STEP, 2, 4).unbind(3)
            fours = lower | upper << 4
        zeros = None
        if weight.zero_points is not None:
            zeros = _of_groups(weight.zero_points + OFFSETS[weight.bits], gate_up)
        scales = weight.scales.bfloat16()
        if not torch.equal(scales.float(), weight.scales):
            scales = weight.scales
        return cls(
            codes=_copy(fours.transpose(1, 2)).flatten(1),
            scales=_of_groups(scales, gate_up),
            zeros=zeros,
            bits=weight.bits,
            block=block,
            blocks=blocks,
            blocks_of_group=blocks if weight.num_groups == 1 else group // block,
            columns=columns,
            out_features=len(weight.codes) // (2 if gate_up else 1),
            in_features=weight.shape[1],
        )

    @classmethod
    def _pack_floats(cls, weight: QuantizedWeight, gate_up: bool, arithmetic: int | None) -> QuantizedPanels:
        octets = weight.codes.view(torch.uint8)
        block, blocks = _blocks(weight)
        pairs = _panels(octets, gate_up).view(-1, WIDTH, block * blocks // 2, 2)
        is_number = (octets & NOT_A_NUMBER != NOT_A_NUMBER).view(len(octets), blocks, block).all(2)
        scales = torch.where(is_number, weight.scales * SCALE_FACTOR, torch.nan)
        is_exact = torch.equal(scales.bfloat16().float(), scales)
        return cls(
            codes=_copy(pairs[:, ORDER].transpose(1, 2)).flatten(1),
            scales=_of_groups(scales.bfloat16() if is_exact else scales, gate_up),
            zeros=None,
            bits=_FLOAT8,
            block=block,
            blocks=blocks,
            blocks_of_group=1,
            columns=None,
            out_features=len(octets) // (2 if gate_up else 1),
            in_features=weight.shape[1],
            arithmetic=_arithmetic_of_floats(arithmetic),
        )


def is_multiplied_here(weight: Weight) -> TypeGuard[QuantizedWeight]:
    """Whether kernels here take it as it is, for rows of bf16, on a CPU: integers in groups of about one size, or FP8
    whose rows are whole groups.
    """
    if not isinstance(weight, QuantizedWeight) or weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return False
    if weight.codes.dtype is torch.int8:
        return AVAILABLE and _padded_inputs(weight) <= max(_MOST_PADDED * weight.shape[1], STEP)
    block, blocks = _blocks(weight)
    is_plain = weight.zero_points is None and weight.input_groups is None
    return HAS_FLOAT8 and is_plain and block % 2 == 0 and block * blocks == weight.shape[1]


def pack_alike(
    weights: Sequence[Weight], *, gate_up: bool = False, arithmetic: int | None = None
) -> list[QuantizedPanels] | None:
    """Panels of all, for one call; None where they are not multiplied here, or not with the same rows."""
    quantized = [weight for weight in weights if is_multiplied_here(weight)]
    if len(quantized) < len(weights) or len({(_blocks(one), one.codes.dtype) for one in quantized}) != 1:
        return None
    return [QuantizedPanels.pack(weight, gate_up=gate_up, arithmetic=arithmetic) for weight in quantized]


def multiply(x: Tensor, matrices: Sequence[QuantizedPanels], counts: Sequence[int], y: Tensor) -> None:
    """Write `y` [R, out]: the first counts[0] rows of `x` [R, in] times the first matrix, and so on."""
    if any(counts):
        Chain(tasks(_ordered(x, matrices, counts), matrices, counts, y)).run()


def gate_up(x: Tensor, matrices: Sequence[QuantizedPanels], counts: Sequence[int], y: Tensor) -> None:
    """Write `y` [R, F] = silu(w1 x) · (w3 x), each matrix packed with `gate_up`.

    Both products, silu and what is multiplied are rounded to bf16, as in the reference.
    """
    if any(counts):
        Chain(tasks(_ordered(x, matrices, counts), matrices, counts, y, gated=True)).run()


def run_quantized(
    w1_w3: Sequence[QuantizedPanels], w2: Sequence[QuantizedPanels], x: Tensor, counts: Sequence[int], y: Tensor
) -> None:
    """Write `y` [R, D] = w2 (silu(w1 x) · (w3 x)): the first counts[0] rows through the first network, and so on."""
    hidden = x.new_empty(x.shape[0], w1_w3[0].out_features)  # [R, F]
    if not any(counts):
        return
    if _are_ordered(w2, counts):
        of_gate = tasks(_ordered(x, w1_w3, counts), w1_w3, counts, hidden, gated=True)
        Chain([*of_gate, *tasks(hidden, w2, counts, y)]).run()
    else:
        gate_up(x, w1_w3, counts, hidden)
        multiply(hidden, w2, counts, y)


def load_kernels() -> None:
    """Compile them now, or read what was compiled: else the first step does."""
    quantized_rows.load_kernels()
    _products.load()
    Chain.load()


def _arithmetic_of_floats(arithmetic: int | None) -> int:
    """The same, if FP8 can be multiplied so; a library's place is taken by the fastest."""
    if arithmetic in FLOAT8_ARITHMETICS:
        return arithmetic
    return tile.FMA if arithmetic == tile.DOT else FLOAT8_ARITHMETICS[-1]


def _blocks(weight: QuantizedWeight) -> tuple[int, int]:
    """k of a block, blocks of a row: what rows are like that it is multiplied with."""
    if weight.codes.dtype is not torch.int8:
        return min(weight.group_size, weight.shape[1]), weight.num_groups
    _, group = _columns(weight)
    block = math.gcd(group, MAX_BLOCK)
    return block, -(-_padded_inputs(weight) // block)


def _padded_inputs(weight: QuantizedWeight) -> int:
    """k of a row once all groups are as large as the largest."""
    columns, _ = _columns(weight)
    return weight.shape[1] if columns is None else len(columns)


def _columns(weight: QuantizedWeight) -> tuple[Tensor | None, int]:
    """The input of each k so that groups are neighbours of one size, a multiple of STEP; None: as they are."""
    in_features = weight.shape[1]
    if weight.num_groups == 1:
        return None, MAX_BLOCK if in_features >= MAX_BLOCK else -(-in_features // STEP) * STEP
    group = group_width(weight, STEP)
    return grouped_columns(weight, group), group


def _panels(matrix: Tensor, gate_up: bool) -> Tensor:
    """[out, N] → [P, 32, N]; of w1 above w3 a panel of each in turn."""
    halves = matrix.view(2 if gate_up else 1, -1, matrix.shape[1])
    padded = F.pad(halves, (0, 0, 0, -halves.shape[1] % WIDTH))
    return padded.view(len(halves), -1, WIDTH, matrix.shape[1]).transpose(0, 1).flatten(0, 1)


def _of_groups(numbers: Tensor, gate_up: bool) -> Tensor:
    """[out, G] → [P, G, 32]."""
    return _copy(_panels(numbers, gate_up).transpose(1, 2))


def _copy(tensor: Tensor) -> Tensor:
    """Contiguous, in a mapping of its own."""
    return mapped(tensor.numel() * tensor.itemsize).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def tasks(
    x: Tensor,
    matrices: Sequence[QuantizedPanels],
    counts: Sequence[int],
    y: Tensor,
    *,
    gated: bool = False,
    integers: Tensor | None = None,
) -> list[Task]:
    """What writes `y`, for a chain: rows become integers, unless for FP8, and are multiplied. Not all counts are 0.

    Neither has gaps, and the inputs of each row of `x` are in the order of its matrix. `integers`: room for as many
    rows of int32, or more, which nobody else needs meanwhile.
    """
    jobs: list[int] = []
    row = 0
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            jobs += (*matrix.job, row, count)
            row += count
    table = torch.tensor(jobs).view(-1, JOB)
    return product_tasks(x, matrix, table, y, gated=gated, integers=integers)


def product_tasks(
    x: Tensor, matrix: QuantizedPanels, jobs: Tensor, y: Tensor, *, gated: bool = False, integers: Tensor | None = None
) -> list[Task]:
    """The same for `jobs` [J, 8] of matrices that are like `matrix`."""
    num_rows, num_jobs = x.shape[0], len(jobs)
    nbytes = num_jobs * (matrix.codes.nbytes + matrix.scales.nbytes)
    multiplications = num_rows * matrix.codes.numel() * 8 // abs(matrix.bits)
    before = []
    if matrix.bits == _FLOAT8:
        rows = x
    else:
        rows = torch.empty(num_rows * matrix.row_words, dtype=torch.int32) if integers is None else integers
        before = [quantize_task(x, matrix.block, matrix.blocks, rows)]
        multiplications *= _DIGITS
    threads = num_threads(nbytes, multiplications)
    num_panels = -(-matrix.out_features // WIDTH)
    arguments = (
        jobs.data_ptr(),
        num_jobs,
        matrix.block,
        matrix.blocks,
        matrix.row_words,
        matrix.arithmetic,
        rows.data_ptr(),
        y.data_ptr(),
        num_rows,
        matrix.out_features,
        RUN_BYTES // (matrix.codes.nbytes // num_panels),
        threads,
        gated,
    )
    return [*before, Task(_products, threads, arguments, (jobs, rows))]


def _are_ordered(matrices: Sequence[QuantizedPanels], counts: Sequence[int]) -> bool:
    """Whether rows can be taken as they come."""
    return all(matrix.columns is None for matrix, count in zip(matrices, counts, strict=True) if count)


def _ordered(x: Tensor, matrices: Sequence[QuantizedPanels], counts: Sequence[int]) -> Tensor:
    """The rows of each matrix with their inputs in its order."""
    if _are_ordered(matrices, counts):
        return x.contiguous()
    parts = F.pad(x, (0, 1)).split(list(counts))
    return torch.cat(
        [
            part[:, :-1] if matrix.columns is None else part[:, matrix.columns]
            for part, matrix, count in zip(parts, matrices, counts, strict=True)
            if count
        ]
    )


@kernel
def _multiply_rows(job, panel, height, block, blocks, words, arithmetic, rows_at, sums_at):  # type: ignore[no-untyped-def]
    """`sums` [height, 32]: so many rows times one panel of a job's matrix."""
    groups = (blocks + job[_BLOCKS_OF_GROUP] - 1) // job[_BLOCKS_OF_GROUP]
    scales_at = job[_SCALES] + panel * groups * WIDTH * (4 if job[_WIDE_SCALES] else 2)
    codes_at = job[_CODES] + panel * blocks * block * WIDTH * abs(job[_BITS]) // 8
    if job[_BITS] == _FLOAT8:
        wide_scales = job[_WIDE_SCALES]
        multiply_float_rows(arithmetic, height, codes_at, scales_at, wide_scales, blocks, block, rows_at, sums_at)
        return
    zeros_at = job[_ZEROS] + panel * groups * WIDTH * 2 if job[_ZEROS] else 0
    multiply_rows(
        job[_BITS],
        height,
        codes_at,
        scales_at,
        job[_WIDE_SCALES],
        zeros_at,
        blocks,
        block,
        job[_BLOCKS_OF_GROUP],
        rows_at,
        words,
        sums_at,
    )


@kernel
def _multiply_panel(job, panel, gated, block, blocks, words, arithmetic, rows_at, y, sums, ups):  # type: ignore[no-untyped-def]
    """All rows of a job with one panel, as many at once as fit the registers.

    Gated, with a panel of w1 and the one of w3 that follows it: both products, then what is made of them.
    """
    row, end = job[_FIRST_ROW], job[_FIRST_ROW] + job[_NUM_ROWS]
    first = panel * WIDTH
    width = min(WIDTH, y.shape[1] - first)
    highest = _HIGHEST_OF_FLOATS if job[_BITS] == _FLOAT8 else _HIGHEST
    stored = 2 * panel if gated else panel
    while row < end:
        height = height_of(end - row, highest)
        at = rows_at + row * words * 4
        _multiply_rows(job, stored, height, block, blocks, words, arithmetic, at, sums.ctypes.data)  # type: ignore[no-untyped-call]
        if gated:
            _multiply_rows(job, stored + 1, height, block, blocks, words, arithmetic, at, ups.ctypes.data)  # type: ignore[no-untyped-call]
            write_gated(sums, ups, height, width, y, row, first)  # type: ignore[no-untyped-call]
        else:
            write_sums(sums, height, width, y, row, first)  # type: ignore[no-untyped-call]
        row += height


@Routine
def _products(task):  # type: ignore[no-untyped-def]
    """Panel by panel; where rows are gated, of w1 and w3 together."""
    jobs_at, num_jobs, block, blocks, words, arithmetic = task[1], task[2], task[3], task[4], task[5], task[6]
    rows_at, y_at, num_rows, width, most, threads, gated = (
        task[7], task[8], task[9], task[10], task[11], task[12], task[13]
    )  # fmt: skip
    jobs = carray(pointer(jobs_at), (num_jobs, JOB), np.int64)
    y = carray(pointer(y_at), (num_rows, width), np.uint16)
    sums = np.empty((_HIGHEST_OF_FLOATS, WIDTH), np.float32)
    ups = np.empty((_HIGHEST_OF_FLOATS, WIDTH), np.float32)
    panels = (width + WIDTH - 1) // WIDTH
    while True:
        item, end = take_run(task, num_jobs * panels, most, threads)  # type: ignore[no-untyped-call]
        if item >= end:
            return
        while item < end:
            job, panel = jobs[item // panels], item % panels
            _multiply_panel(job, panel, gated, block, blocks, words, arithmetic, rows_at, y, sums, ups)  # type: ignore[no-untyped-call]
            item += 1
