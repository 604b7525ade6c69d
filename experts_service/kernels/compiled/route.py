"""Sorts rows by the experts that were chosen for them, compiled. Knows indices and rows; knows no weight.

    chosen  [T, K] int64   of each row its experts, in any order
    places  [K, T] int64   where the pairs of a row and an expert stand once they are sorted: by expert, choice and row;
                           those of a row by ascending expert
    pairs   [K, T] int64   choice · T + row of the same: where its weight is
    counts  [E] int64      rows of each expert

of experts here       sorted  [K · T, D]      the row of each pair
                      jobs    [J, fields]     of each expert with rows what `tables` [E, fields] says of it, then its
                                              first row in `sorted` and how many; zeros once there are no more
of experts elsewhere  indices [K · T] int64   the index of each pair's row, experts in the order of their `ranks` [E]
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


class _Sorting:
    """Where rows go, for a chain. All stays where it is."""

    def __init__(self, num_rows: int, top_k: int) -> None:
        self.places, self.pairs = (torch.empty(top_k, num_rows, dtype=torch.int64) for _ in range(2))

    def _task(
        self,
        rows: Tensor,
        chosen: Tensor,
        counts: Tensor,
        sorted_rows: Tensor | None,
        indices: Tensor | None,
        ranks: Tensor,
        of_tables: Sequence[int],
    ) -> Task:
        """`of_tables`: how many jobs, and of each table its address, that of its jobs, and the fields of both."""
        arguments = (
            *chosen.shape,
            len(counts),
            rows.shape[1],
            *(one.data_ptr() for one in (chosen, rows, self.places, self.pairs, counts, ranks)),
            *(0 if one is None else one.data_ptr() for one in (sorted_rows, indices)),
            *of_tables,
        )
        return Task(_route, 1, arguments, (rows, chosen, counts, sorted_rows, indices, ranks))


class RouteElsewhere(_Sorting):
    """Which rows of `chosen` which experts elsewhere are sent, and where their answers are."""

    def __init__(self, num_rows: int, top_k: int, hidden: int, ranks: Tensor) -> None:
        """`ranks` [E]: the place of each expert where groups stand in a row."""
        super().__init__(num_rows, top_k)
        self.indices = torch.empty(top_k * num_rows, dtype=torch.int64)
        self.counts = torch.empty(len(ranks), dtype=torch.int64)  # by rank
        self.answers = torch.empty(top_k * num_rows, hidden, dtype=torch.bfloat16)
        self._ranks = ranks

    def task(self, rows: Tensor, chosen: Tensor) -> Task:
        """What sorts `rows` [T, D]."""
        nothing = [0] * (1 + 3 * _TABLES)
        return self._task(rows, chosen, self.counts, None, self.indices, self._ranks, nothing)


class Route(_Sorting):
    """Where the rows of `chosen` go, whose experts are here."""

    def __init__(self, num_rows: int, top_k: int, num_experts: int, hidden: int) -> None:
        super().__init__(num_rows, top_k)
        self.num_jobs = min(num_experts, top_k * num_rows)
        self.sorted = torch.empty(top_k * num_rows, hidden, dtype=torch.bfloat16)
        self._ranks = torch.arange(num_experts)

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
        flat = [self.num_jobs, *(number for of_table in of_tables for number in of_table)]
        task = self._task(rows, chosen, counts, self.sorted, None, self._ranks, flat)
        return task._replace(keeps=(*task.keeps, tables, jobs))


@Routine
def _route(task):  # type: ignore[no-untyped-def]
    """One item: there are few rows."""
    if take(task) > 0:
        return
    num_rows, top_k, num_experts, width = task[1], task[2], task[3], task[4]
    chosen = carray(pointer(task[5]), (num_rows, top_k), np.int64)
    rows = carray(pointer(task[6]), (num_rows, width), np.uint16)
    places = carray(pointer(task[7]), (top_k, num_rows), np.int64)
    pairs = carray(pointer(task[8]), (top_k, num_rows), np.int64)
    counts = carray(pointer(task[9]), num_experts, np.int64)
    ranks = carray(pointer(task[10]), num_experts, np.int64)
    by_expert = carray(pointer(task[11]), (num_rows * top_k, width), np.uint16)
    indices = carray(pointer(task[12]), num_rows * top_k, np.int64)
    copies, names = task[11] != 0, task[12] != 0
    counts[:] = 0
    for row in range(num_rows):
        for k in range(top_k):
            counts[ranks[chosen[row, k]]] += 1
    following = np.empty(num_experts, np.int64)  # place of each expert, by rank
    num_jobs, place, job = task[13], 0, 0
    for expert in range(num_experts):
        following[expert] = place
        if counts[expert]:
            for table in range(2):
                fields = task[16 + 3 * table]
                if fields:
                    of_expert = carray(pointer(task[14 + 3 * table]), (num_experts, fields), np.int64)[expert]
                    of_job = carray(pointer(task[15 + 3 * table]), (num_jobs, fields), np.int64)[job]
                    of_job[:] = of_expert
                    of_job[fields - 2], of_job[fields - 1] = place, counts[expert]
            job += 1
            place += counts[expert]
    for table in range(2):
        fields = task[16 + 3 * table]
        if fields:
            carray(pointer(task[15 + 3 * table]), (num_jobs, fields), np.int64)[job:] = 0
    for k in range(top_k):
        for row in range(num_rows):
            expert = chosen[row, k]
            place = following[ranks[expert]]
            following[ranks[expert]] += 1
            if copies:
                by_expert[place] = rows[row]
            if names:
                indices[place] = row
            rank = 0  # of the expert among the row's
            for other in range(top_k):
                rank += chosen[row, other] < expert
            places[rank, row], pairs[rank, row] = place, k * num_rows + row
