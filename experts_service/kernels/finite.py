"""Whether numbers are finite: one look at each answer. Knows tensors; knows not what they mean.

torch's sum says so as well. Of two rows of 4096 in bf16 it took 2 microseconds in a loop and 14 between the round trips
of a dispatch, whose processes take each other's caches.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from experts_service.kernels.compiled.jit import AVAILABLE, pointer
from experts_service.kernels.compiled.routine import Routine

if AVAILABLE:
    from numba import carray

_WORD = 4  # numbers of bf16, looked at together
_EXPONENTS = np.uint64(0x7F80_7F80_7F80_7F80)  # all ones in an infinity and in what is not a number
_CARRIES, _SIGNS = np.uint64(0x0080_0080_0080_0080), np.uint64(0x8000_8000_8000_8000)
_Task = ctypes.c_int64 * 3


def load() -> None:
    """Compile it now, or read what was compiled."""
    if AVAILABLE:
        _not_finite.load()


def all_finite(numbers: Tensor) -> bool:
    """Of `numbers` without gaps. May say no where they are, but their sum is not."""
    count = numbers.numel()
    if not (AVAILABLE and numbers.dtype is torch.bfloat16 and numbers.is_cpu and count % _WORD == 0):
        return math.isfinite(numbers.sum())
    task = _Task(count // _WORD, numbers.data_ptr(), 0)
    _not_finite.run_at(ctypes.addressof(task), 1)
    return not task[2]


@Routine
def _not_finite(task):  # type: ignore[no-untyped-def]
    """Set task[2] where one of the numbers in task[0] words at task[1] is not."""
    count = task[0]
    words = carray(pointer(task[1]), count, np.uint64)
    found = np.uint64(0)
    for i in range(count):
        found |= (words[i] & _EXPONENTS) + _CARRIES  # carries into the sign, no further
    task[2] = (found & _SIGNS) != 0
