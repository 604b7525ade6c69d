"""Matmuls of bf16 rows with packed bf16 weights, on a CPU. Knows panels and rows; knows no layer and no expert.

    jobs    [J, 3]               of each matrix: where its weights are, its first row, how many rows
    x       [R, K]  bf16         rows, those of one job together
    weights [P, K / 2, 32, 2]    panels of 32 outputs each (see tile.py)
    y       [R, out]  bf16       each sum is rounded once

The items that threads share are panels: one is read once from memory and meets all rows of its job. A thread takes
several side by side: two that read every other panel got 40 GB/s, where runs of 256 KB and whole halves gave 57.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.jit import AVAILABLE, bits, fma, from_bits, kernel, narrow, pointer, widen
from experts_service.kernels.routine import Routine, num_threads, take_run
from experts_service.kernels.tile import HEIGHTS, PAIR, WIDTH, multiply_rows
from experts_service.memory import mapped

if AVAILABLE:
    from numba import carray

_PANEL_STEP_BYTES = WIDTH * PAIR * 2
_RUN_BYTES = 1 << 20  # of weights that a thread reads in one go; from 256 KB on no more is faster
_HIGHEST = HEIGHTS[-1]

# e^x: 2^n e^r, r = x - n ln 2, |r| ≤ ln 2 / 2; n by adding 1.5 · 2^23, which leaves it in the lowest bits.
_LOG2_E, _ROUNDER = np.float32(1.44269504), np.float32(12582912.0)
_LN2_UPPER, _LN2_LOWER = np.float32(-0.693359375), np.float32(2.12194440e-4)
_EXP_LIMIT, _INFINITY = np.float32(88.0), np.float32(np.inf)
_C2, _C3, _C4 = np.float32(0.5), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE = np.float32(1.0)


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [out, in] as kernels read it: zeros make up the last panel and an odd k."""

    weights: Tensor  # [P, K / 2, 32, 2] bf16
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor) -> Panels:
        """A copy of `weight` [out, in]."""
        out_features, in_features = weight.shape
        missing = (0, -in_features % PAIR, 0, -out_features % WIDTH)
        padded = F.pad(weight, missing) if any(missing) else weight.contiguous()
        panels = padded.view(-1, WIDTH, padded.shape[1] // PAIR, PAIR).transpose(1, 2)
        return cls(_empty(panels.shape).copy_(panels), out_features, in_features)


def multiply(arithmetic: int, x: Tensor, matrices: Sequence[Panels], counts: Sequence[int], y: Tensor) -> None:
    """Write `y` [R, out]: the first counts[0] rows of `x` [R, in] times the first matrix, and so on."""
    _run(_multiply, arithmetic, x, matrices, counts, y)


def gate_up(arithmetic: int, x: Tensor, matrices: Sequence[Panels], counts: Sequence[int], y: Tensor) -> None:
    """Write `y` [R, F] = silu(w1 x) · (w3 x), each matrix being `pack_gate_up(w1, w3)`.

    Both products, silu and what is multiplied are rounded to bf16, as in the reference.
    """
    _run(_gate_up, arithmetic, x, matrices, counts, y)


def pack_gate_up(w1: Tensor, w3: Tensor) -> Panels:
    """Panels of w1 [F, D] and w3 [F, D] in turn."""
    gate, up = Panels.pack(w1), Panels.pack(w3)
    panels, *shape = gate.weights.shape
    both = _empty((panels, 2, *shape))
    both[:, 0], both[:, 1] = gate.weights, up.weights
    return Panels(both.flatten(0, 1), len(w1), gate.in_features)  # [2P, D / 2, 32, 2]


def _empty(shape: Sequence[int]) -> Tensor:
    return mapped(math.prod(shape) * 2).view(torch.bfloat16).view(shape)


def load_kernels() -> None:
    """Compile them now, or read what was compiled: else the first step does."""
    _multiply.load()
    _gate_up.load()


def _run(
    routine: Routine, arithmetic: int, x: Tensor, matrices: Sequence[Panels], counts: Sequence[int], y: Tensor
) -> None:
    jobs: list[int] = []
    row = 0
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            jobs += (matrix.weights.data_ptr(), row, count)
            row += count
    if not jobs:
        return
    if matrix.in_features % PAIR:
        x = F.pad(x, (0, 1))
    x = x.contiguous()
    num_jobs, num_weights = len(jobs) // 3, matrix.weights.numel()
    table = (ctypes.c_int64 * len(jobs))(*jobs)
    threads = num_threads(2 * num_jobs * num_weights, row * num_weights)
    routine.run(
        threads,
        arithmetic,
        ctypes.addressof(table),
        num_jobs,
        matrix.weights.shape[1],
        x.data_ptr(),
        y.data_ptr(),
        row,
        matrix.out_features,
        threads,
    )


@kernel
def _height(rows: int) -> int:
    """The most of HEIGHTS that so many rows fill."""
    height = _HIGHEST
    while height > rows:
        height //= 2
    return height


@kernel
def exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32: infinity above 88, next to nothing below -88. NaN stays NaN."""
    t = x
    if t > _EXP_LIMIT:
        t = _EXP_LIMIT
    if t < -_EXP_LIMIT:
        t = -_EXP_LIMIT
    shifted = fma(t, _LOG2_E, _ROUNDER)
    n = shifted - _ROUNDER
    r = fma(n, _LN2_LOWER, fma(n, _LN2_UPPER, t))
    p = fma(fma(fma(fma(fma(fma(_C7, r, _C6), r, _C5), r, _C4), r, _C3), r, _C2), r * r, r + _ONE)
    e = from_bits(bits(p) + (bits(shifted) << 23))
    if x > _EXP_LIMIT:
        e = _INFINITY
    return e


@kernel
def _silu(x):  # type: ignore[no-untyped-def]
    """x / (1 + e^-x) in float32. NaN stays NaN."""
    return x / (_ONE + exp(-x))  # type: ignore[no-untyped-call]


@Routine
def _multiply(task):  # type: ignore[no-untyped-def]
    """Panel by panel: all rows of a job, as many at once as fit the registers."""
    arithmetic, jobs_at, num_jobs, pairs = task[1], task[2], task[3], task[4]
    x_at, y_at, num_rows, out_features, threads = task[5], task[6], task[7], task[8], task[9]
    jobs = carray(pointer(jobs_at), (num_jobs, 3), np.int64)
    y = carray(pointer(y_at), (num_rows, out_features), np.uint16)
    sums = np.empty((_HIGHEST, WIDTH), np.float32)
    panels = (out_features + WIDTH - 1) // WIDTH
    most = _RUN_BYTES // (pairs * _PANEL_STEP_BYTES)
    while True:
        item, end_item = take_run(task, num_jobs * panels, most, threads)  # type: ignore[no-untyped-call]
        if item >= end_item:
            return
        while item < end_item:
            job, panel = item // panels, item % panels
            weights_at = jobs[job, 0] + panel * pairs * _PANEL_STEP_BYTES
            row, end = jobs[job, 1], jobs[job, 1] + jobs[job, 2]
            first = panel * WIDTH
            width = min(WIDTH, out_features - first)
            while row < end:
                height = _height(end - row)
                rows_at = x_at + row * pairs * (PAIR * 2)
                multiply_rows(arithmetic, height, weights_at, rows_at, pairs, pairs, sums.ctypes.data)
                for r in range(height):
                    for o in range(width):
                        y[row + r, first + o] = narrow(sums[r, o])
                row += height
            item += 1


@Routine
def _gate_up(task):  # type: ignore[no-untyped-def]
    """The same for panels of w1 and w3 in turn: both products, then what is made of them."""
    arithmetic, jobs_at, num_jobs, pairs = task[1], task[2], task[3], task[4]
    x_at, y_at, num_rows, out_features, threads = task[5], task[6], task[7], task[8], task[9]
    jobs = carray(pointer(jobs_at), (num_jobs, 3), np.int64)
    y = carray(pointer(y_at), (num_rows, out_features), np.uint16)
    gates = np.empty((_HIGHEST, WIDTH), np.float32)
    ups = np.empty((_HIGHEST, WIDTH), np.float32)
    panels = (out_features + WIDTH - 1) // WIDTH
    panel_bytes = pairs * _PANEL_STEP_BYTES
    most = _RUN_BYTES // (2 * panel_bytes)
    while True:
        item, end_item = take_run(task, num_jobs * panels, most, threads)  # type: ignore[no-untyped-call]
        if item >= end_item:
            return
        while item < end_item:
            job, panel = item // panels, item % panels
            gate_at = jobs[job, 0] + 2 * panel * panel_bytes
            row, end = jobs[job, 1], jobs[job, 1] + jobs[job, 2]
            first = panel * WIDTH
            width = min(WIDTH, out_features - first)
            while row < end:
                height = _height(end - row)
                rows_at = x_at + row * pairs * (PAIR * 2)
                multiply_rows(arithmetic, height, gate_at, rows_at, pairs, pairs, gates.ctypes.data)
                multiply_rows(arithmetic, height, gate_at + panel_bytes, rows_at, pairs, pairs, ups.ctypes.data)
                for r in range(height):
                    for o in range(width):
                        gate, up = widen(narrow(gates[r, o])), widen(narrow(ups[r, o]))
                        y[row + r, first + o] = narrow(widen(narrow(_silu(gate))) * up)  # type: ignore[no-untyped-call]
                row += height
            item += 1
