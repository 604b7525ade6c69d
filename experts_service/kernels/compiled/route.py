"""Sorts rows by the experts that were chosen for them, compiled. Knows indices and rows; knows no weight.

    chosen  [T, K] int64   of each row its experts, in any order
    sorted  [K · T, D]     the row of each pair of a row and an expert, by expert, choice and row
    places  [K, T] int64   where that is for the experts of a row, ascending
    pairs   [K, T] int64   choice · T + row of the same: where its weight is
    counts  [E] int64      rows of each expert
    jobs    [J, fields]    of each expert with rows what `tables` [E, fields] says of it, then its first row in `sorted`
                           and how many; zeros once there are no more

The dispatcher says the same of experts elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from experts_service.kernels.compiled.jit import AVAILABLE, pointer, take
from experts_service.kernels.compiled.routine import Routine, Task

if AVAILABLE:
    from numba import carray

_TABLES = 2  # at most: of w1 with w3, and of w2


class Route:
    """Where the rows of `chosen` go, for a chain. All stays where it is."""

    def __init__(self, num_rows: int, top_k: int, num_experts: int, hidden: int) -> None:
        self.num_jobs = min(num_experts, top_k * num_rows)
        self.sorted = torch.empty(top_k * num_rows, hidden, dtype=torch.bfloat16)
        self.places, self.pairs = (torch.empty(top_k, num_rows, dtype=torch.int64) for _ in range(2))

    @staticmethod
    def load() -> None:
        """Compile it now, or read what was compiled."""
        _route.load()

    def task(
        self, rows: Tensor, chosen: Tensor, counts: Tensor, tables: Sequence[Tensor], jobs: Sequence[Tensor]
    ) -> Task:
        """What sorts `rows` [T, D] without gaps."""
        of_tables = [
            (table.data_ptr(), of_table.data_ptr(), table.shape[1])
            for table, of_table in zip(tables, jobs, strict=True)
        ]
        of_tables += [(0, 0, 0)] * (_TABLES - len(of_tables))
        arguments = (
            *chosen.shape,
            len(counts),
            rows.shape[1],
            *(one.data_ptr() for one in (chosen, rows, self.sorted, self.places, self.pairs, counts)),
            self.num_jobs,
            *(number for of_table in of_tables for number in of_table),
        )
        return Task(_route, 1, arguments, (rows, chosen, counts, tables, jobs))


@Routine
def _route(task):  # type: ignore[no-untyped-def]
    """One item: there are few rows."""
    if take(task) > 0:
        return
    num_rows, top_k, num_experts, width = task[1], task[2], task[3], task[4]
    chosen = carray(pointer(task[5]), (num_rows, top_k), np.int64)
    rows = carray(pointer(task[6]), (num_rows, width), np.uint16)
    by_expert = carray(pointer(task[7]), (num_rows * top_k, width), np.uint16)
    places = carray(pointer(task[8]), (top_k, num_rows), np.int64)
    pairs = carray(pointer(task[9]), (top_k, num_rows), np.int64)
    counts = carray(pointer(task[10]), num_experts, np.int64)
    counts[:] = 0
    for row in range(num_rows):
        for k in range(top_k):
            counts[chosen[row, k]] += 1
    following = np.empty(num_experts, np.int64)  # place of each expert
    num_jobs, place, job = task[11], 0, 0
    for expert in range(num_experts):
        following[expert] = place
        if counts[expert]:
            for table in range(2):
                fields = task[14 + 3 * table]
                if fields:
                    of_expert = carray(pointer(task[12 + 3 * table]), (num_experts, fields), np.int64)[expert]
                    of_job = carray(pointer(task[13 + 3 * table]), (num_jobs, fields), np.int64)[job]
                    of_job[:] = of_expert
                    of_job[fields - 2], of_job[fields - 1] = place, counts[expert]
            job += 1
            place += counts[expert]
    for table in range(2):
        fields = task[14 + 3 * table]
        carray(pointer(task[13 + 3 * table]), (num_jobs, fields), np.int64)[job:] = 0
    for k in range(top_k):
        for row in range(num_rows):
            expert = chosen[row, k]
            place = following[expert]
            following[expert] += 1
            by_expert[place] = rows[row]
            rank = 0  # of the expert among the row's
            for other in range(top_k):
                rank += chosen[row, other] < expert
            places[rank, row], pairs[rank, row] = place, k * num_rows + row
