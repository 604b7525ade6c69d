"""Matmuls of bf16 rows with packed bf16 weights, on a CPU. Knows panels and rows; knows no layer and no expert.

    jobs    [J, 4]               of each network: where w1 and w3 are, where w2 is, its first row, how many rows
    x       [R, K]  bf16         rows, those of one job together
    weights [P, K / 2, 32, 2]    panels of 32 outputs each (see tile.py)
    y       [R, out]  bf16       each sum is rounded once

The items that threads share are panels: one is read once from memory and meets all rows of its job. A thread takes
several side by side: two that read every other panel got 40 GB/s, where runs of 256 KB and whole halves gave 57.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.compiled.jit import (
    AVAILABLE,
    bits,
    counter,
    fma,
    from_bits,
    kernel,
    narrow,
    pointer,
    take_several,
    widen,
)
from experts_service.kernels.compiled.routine import Routine, Task, num_threads, take_run, wait_for
from experts_service.kernels.compiled.tile import HEIGHTS, PAIR, WIDTH, multiply_rows
from experts_service.memory import mapped

if AVAILABLE:
    from numba import carray

JOB = 4  # fields
_PANEL_STEP_BYTES = WIDTH * PAIR * 2
RUN_BYTES = 1 << 20  # of weights that a thread reads in one go; from 256 KB on no more is faster
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


def multiply(arithmetic: int, x: Tensor, matrix: Panels, y: Tensor) -> None:
    """Write `y` [R, out] = `x` [R, in] times the matrix."""
    if x.shape[0]:
        x = _paired(x)
        multiply_task(arithmetic, x, matrix, y).run()


def multiply_task(arithmetic: int, x: Tensor, matrix: Panels, y: Tensor) -> Task:
    """What does that. Neither has gaps, and `x` an even number of columns, zeros beyond those of the matrix."""
    num_rows, num_weights = x.shape[0], matrix.weights.numel()
    threads = num_threads(2 * num_weights, num_rows * num_weights)
    arguments = (
        arithmetic,
        matrix.weights.data_ptr(),
        matrix.weights.shape[1],
        x.data_ptr(),
        y.data_ptr(),
        num_rows,
        matrix.out_features,
        threads,
    )
    return Task(_multiply, threads, arguments)


def run_networks(
    arithmetic: int,
    x: Tensor,
    networks: Sequence[tuple[Panels, Panels]],
    counts: Sequence[int],
    y: Tensor,
) -> None:
    """Write `y` [R, D] = w2 (silu(w1 x) · (w3 x)): the first counts[0] rows through the first network, and so on.

    A network is `pack_gate_up(w1, w3)` and w2, all of one size. Both products, silu and what is multiplied are rounded
    to bf16, as in the reference.
    """
    jobs: list[int] = []
    row = 0
    for (w1_w3, w2), count in zip(networks, counts, strict=True):
        if count:
            jobs += (w1_w3.weights.data_ptr(), w2.weights.data_ptr(), row, count)
            row += count
    if not jobs:
        return
    x = _paired(x)
    table = torch.tensor(jobs).view(-1, JOB)
    hidden = x.new_empty(row, PAIR * w2.weights.shape[1])  # [R, F]
    if w2.in_features % PAIR:
        hidden[:, -1] = 0
    networks_task(arithmetic, x, (w1_w3, w2), table, hidden, y).run()


def networks_task(
    arithmetic: int, x: Tensor, network: tuple[Panels, Panels], jobs: Tensor, hidden: Tensor, y: Tensor
) -> Task:
    """What does that for `jobs` [J, 4], whose networks are of the size of `network`.

    As for `multiply_task` of `x`, and of `hidden` [R, F], which nobody else needs meanwhile.
    """
    w1_w3, w2 = network
    num_jobs, row, num_weights = len(jobs), x.shape[0], w1_w3.weights.numel() + w2.weights.numel()
    hidden_pairs = w2.weights.shape[1]
    threads = num_threads(2 * num_jobs * num_weights, row * num_weights)
    arguments = (
        *(0, 0),  # counters
        arithmetic,
        jobs.data_ptr(),
        num_jobs,
        w1_w3.weights.shape[1],
        hidden_pairs,
        x.data_ptr(),
        hidden.data_ptr(),
        y.data_ptr(),
        row,
        w1_w3.out_features,
        w2.out_features,
        threads,
    )
    return Task(_networks, threads, arguments, (jobs, hidden))


def _paired(x: Tensor) -> Tensor:
    """Rows [R, K] without gaps, with a zero after an odd K."""
    return F.pad(x, (0, 1)) if x.shape[1] % PAIR else x.contiguous()


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
    _networks.load()


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
def silu(x):  # type: ignore[no-untyped-def]
    """x / (1 + e^-x) in float32. NaN stays NaN."""
    return x / (_ONE + exp(-x))  # type: ignore[no-untyped-call]


@kernel
def height_of(rows: int, highest: int) -> int:
    """How many of the rows are multiplied at once: a power of two, at most `highest`."""
    height = highest
    while height > rows:
        height //= 2
    return height


@kernel
def write_sums(sums, height, width, y, row, first):  # type: ignore[no-untyped-def]
    """The first rows and columns of `sums` [H, 32], rounded, into `y` [R, out] from a row and a column on."""
    for r in range(height):
        for o in range(width):
            y[row + r, first + o] = narrow(sums[r, o])


@kernel
def write_gated(gates, ups, height, width, y, row, first):  # type: ignore[no-untyped-def]
    """The same of silu(gates) · ups; both, silu and the product are rounded to bf16, as in the reference."""
    for r in range(height):
        for o in range(width):
            gate, up = widen(narrow(gates[r, o])), widen(narrow(ups[r, o]))
            y[row + r, first + o] = narrow(widen(narrow(silu(gate))) * up)  # type: ignore[no-untyped-call]


@kernel
def _multiply_panel(arithmetic, gated, panel, weights_at, pairs, x_at, row, end, y, width, sums, ups):  # type: ignore[no-untyped-def]
    """Rows row … end - 1 with one panel, as many at once as fit the registers, into columns of `y`, `width` in all.

    Gated, with a panel of w1 and the one of w3 that follows it: both products, then what is made of them.
    """
    first = panel * WIDTH
    width = min(WIDTH, width - first)
    up_at = weights_at + pairs * _PANEL_STEP_BYTES
    while row < end:
        height = height_of(end - row, _HIGHEST)
        rows_at = x_at + row * pairs * (PAIR * 2)
        multiply_rows(arithmetic, height, weights_at, rows_at, pairs, pairs, sums.ctypes.data)
        if gated:
            multiply_rows(arithmetic, height, up_at, rows_at, pairs, pairs, ups.ctypes.data)
            write_gated(sums, ups, height, width, y, row, first)  # type: ignore[no-untyped-call]
        else:
            write_sums(sums, height, width, y, row, first)  # type: ignore[no-untyped-call]
        row += height


@Routine
def _multiply(task):  # type: ignore[no-untyped-def]
    """Panel by panel."""
    arithmetic, weights_at, pairs, x_at, y_at = task[1], task[2], task[3], task[4], task[5]
    num_rows, out_features, threads = task[6], task[7], task[8]
    y = carray(pointer(y_at), (num_rows, out_features), np.uint16)
    sums = np.empty((_HIGHEST, WIDTH), np.float32)
    panels, panel_bytes = (out_features + WIDTH - 1) // WIDTH, pairs * _PANEL_STEP_BYTES
    while True:
        panel, end = take_run(task, panels, RUN_BYTES // panel_bytes, threads)  # type: ignore[no-untyped-call]
        if panel >= end:
            return
        while panel < end:
            at = weights_at + panel * panel_bytes
            _multiply_panel(arithmetic, False, panel, at, pairs, x_at, 0, num_rows, y, out_features, sums, sums)  # type: ignore[no-untyped-call]
            panel += 1


@Routine
def _networks(task):  # type: ignore[no-untyped-def]
    """Panel by panel: those of w1 and w3 of all jobs; when all are done, those of w2."""
    done, of_w2 = counter(task, 1), counter(task, 2)
    arithmetic, jobs_at, num_jobs, pairs, hidden_pairs = task[3], task[4], task[5], task[6], task[7]
    x_at, hidden_at, y_at, num_rows, intermediate, width, threads = (
        task[8], task[9], task[10], task[11], task[12], task[13], task[14]
    )  # fmt: skip
    jobs = carray(pointer(jobs_at), (num_jobs, 4), np.int64)
    hidden = carray(pointer(hidden_at), (num_rows, hidden_pairs * PAIR), np.uint16)
    y = carray(pointer(y_at), (num_rows, width), np.uint16)
    sums = np.empty((_HIGHEST, WIDTH), np.float32)
    ups = np.empty((_HIGHEST, WIDTH), np.float32)
    panels, panel_bytes = (intermediate + WIDTH - 1) // WIDTH, 2 * pairs * _PANEL_STEP_BYTES
    while True:
        item, end_item = take_run(task, num_jobs * panels, RUN_BYTES // panel_bytes, threads)  # type: ignore[no-untyped-call]
        if item >= end_item:
            break
        length = end_item - item
        while item < end_item:
            job, panel = item // panels, item % panels
            row, end = jobs[job, 2], jobs[job, 2] + jobs[job, 3]
            at = jobs[job, 0] + panel * panel_bytes
            _multiply_panel(arithmetic, True, panel, at, pairs, x_at, row, end, hidden, intermediate, sums, ups)  # type: ignore[no-untyped-call]
            item += 1
        take_several(done, length)
    wait_for(done, num_jobs * panels)  # type: ignore[no-untyped-call]
    panels, panel_bytes = (width + WIDTH - 1) // WIDTH, hidden_pairs * _PANEL_STEP_BYTES
    while True:
        item, end_item = take_run(of_w2, num_jobs * panels, RUN_BYTES // panel_bytes, threads)  # type: ignore[no-untyped-call]
        if item >= end_item:
            return
        while item < end_item:
            job, panel = item // panels, item % panels
            row, end = jobs[job, 2], jobs[job, 2] + jobs[job, 3]
            at = jobs[job, 1] + panel * panel_bytes
            _multiply_panel(arithmetic, False, panel, at, hidden_pairs, hidden_at, row, end, y, width, sums, ups)  # type: ignore[no-untyped-call]
            item += 1
