"""The largest values of each row, and where they are. Of equal ones the first come first, whatever else is asked for.

Shapes: P rows, V columns, K largest ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from experts_service.kernels.compiled import jit
from experts_service.kernels.compiled.jit import kernel, pointer, take
from experts_service.kernels.compiled.routine import Routine, num_threads

if jit.AVAILABLE:
    from numba import carray

_BLOCK = 64  # columns that are looked at as one
_READ_BYTES = 8  # that a thread reads while it looks at one value


def top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row of `values` [P, V] (fp32), from the largest down, and their columns, [P, K]."""
    count = min(count, values.shape[1])
    if values.is_cuda or not jit.AVAILABLE:
        return _top(values, count)
    largest = torch.empty(len(values), count)
    columns = torch.empty(len(values), count, dtype=torch.int64)
    if count:
        values = values.contiguous()
        threads = num_threads(_READ_BYTES * values.numel(), 0)
        _find.run(threads, values.data_ptr(), *values.shape, count, largest.data_ptr(), columns.data_ptr())
    return largest, columns


@Routine
def _find(task):  # type: ignore[no-untyped-def]
    """Fill the largest values and their columns [P, K], K > 0: each stands behind all that are at least as large."""
    num_rows, width, count = task[2], task[3], task[4]
    values = carray(pointer(task[1]), (num_rows, width), np.float32)
    all_largest = carray(pointer(task[5]), (num_rows, count), np.float32)
    all_columns = carray(pointer(task[6]), (num_rows, count), np.int64)
    while True:
        row = take(task)
        if row >= num_rows:
            return
        largest, columns = all_largest[row], all_columns[row]
        for column in range(count):
            _insert(largest, columns, column, values[row, column], column)
        for start in range(count, width, _BLOCK):
            block = values[row, start : start + _BLOCK]
            if _num_above(block, largest[count - 1]):
                for index in range(len(block)):
                    if block[index] > largest[count - 1]:
                        _insert(largest, columns, count - 1, block[index], start + index)


@kernel
def _num_above(block: NDArray[np.float32], bound: np.float32) -> np.int32:
    number = np.int32(0)
    for index in range(len(block)):
        number += np.int32(block[index] > bound)
    return number


@kernel
def _insert(
    largest: NDArray[np.float32], columns: NDArray[np.int64], place: int, value: np.float32, column: int
) -> None:
    """Into the first `place` entries, which are in order; what stood at `place` goes."""
    while place > 0 and largest[place - 1] < value:
        largest[place] = largest[place - 1]
        columns[place] = columns[place - 1]
        place -= 1
    largest[place] = value
    columns[place] = column


def _top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """They lie in the `count` blocks of columns whose largest values are largest; of equal ones in the first."""
    num_rows, width = values.shape
    num_blocks = width // _BLOCK
    if num_blocks <= count:
        columns = torch.arange(width, device=values.device).expand(num_rows, -1)
    else:
        whole = values[:, : num_blocks * _BLOCK]
        blocks = whole.unflatten(1, (num_blocks, _BLOCK)).amax(dim=-1).sort(descending=True, stable=True).indices
        first = blocks[:, :count].sort().values[:, :, None] * _BLOCK  # [P, K, 1], in the order of columns
        columns = (first + torch.arange(_BLOCK, device=values.device)).flatten(1)
        rest = torch.arange(num_blocks * _BLOCK, width, device=values.device).expand(num_rows, -1)
        columns = torch.cat([columns, rest], dim=1)
    found = values.gather(1, columns).sort(descending=True, stable=True)
    return found.values[:, :count], columns.gather(1, found.indices[:, :count])
