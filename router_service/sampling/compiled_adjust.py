"""What sequences wish of their logits, compiled, rows over threads. Knows no parameters and no tensor.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experts_service.kernels.compiled.jit import AVAILABLE, kernel, pointer, take
from experts_service.kernels.compiled.routine import Routine, num_threads

if AVAILABLE:
    from numba import carray

_READ_BYTES = 12  # that a thread reads while it changes one logit in every way


@dataclass(frozen=True, slots=True)
class Wishes:
    """Of one row. None: nobody wishes it."""

    divisors: NDArray[np.float32] | None = None  # [V], 1 where there is no repetition penalty
    is_reward: bool = False  # whether the divisors are below 1
    penalties: NDArray[np.float32] | None = None  # [V] is taken off
    bias_ids: NDArray[np.int64] | None = None
    bias: NDArray[np.float32] | None = None  # one of each
    mask: NDArray[np.uint8] | None = None  # [V / 8, rounded up]: a bit for every token that may come, lowest first

    @property
    def fields(self) -> tuple[int, ...]:
        """As `_adjust_rows` has them: addresses, which are good as long as this lives, and lengths."""
        arrays = (self.divisors, self.penalties, self.bias_ids, self.bias, self.mask)
        places = ((0, 0) if array is None else (array.ctypes.data, len(array)) for array in arrays)
        return (self.is_reward, *(number for place in places for number in place))


_FIELDS = 12  # of a row: its number, and those above


def adjust(logits: NDArray[np.float32], wishes: Seq[tuple[int, Wishes]]) -> None:
    """Change `logits` [B, V] in place by what some rows wish."""
    table = np.array([(row, *of_row.fields) for row, of_row in wishes], np.int64)
    vocabulary = logits.shape[1]
    threads = num_threads(_READ_BYTES * len(wishes) * vocabulary, 0)
    _adjust_rows.run(threads, logits.ctypes.data, vocabulary, table.ctypes.data, len(wishes))


@Routine
def _adjust_rows(task):  # type: ignore[no-untyped-def]
    """The rows of the table."""
    vocabulary, num_rows = task[2], task[4]
    table = carray(pointer(task[3]), (num_rows, _FIELDS), np.int64)
    while True:
        item = take(task)
        if item >= num_rows:
            return
        fields = table[item]
        _adjust(
            carray(pointer(task[1] + 4 * vocabulary * fields[0]), vocabulary, np.float32),
            fields[1] != 0,
            carray(pointer(fields[2]), fields[3], np.float32),
            carray(pointer(fields[4]), fields[5], np.float32),
            carray(pointer(fields[6]), fields[7], np.int64),
            carray(pointer(fields[8]), fields[9], np.float32),
            carray(pointer(fields[10]), fields[11], np.uint8),
        )


@kernel
def _adjust(
    logits: NDArray[np.float32],
    is_reward: bool,
    divisors: NDArray[np.float32],
    penalties: NDArray[np.float32],
    bias_ids: NDArray[np.int64],
    bias: NDArray[np.float32],
    mask: NDArray[np.uint8],
) -> None:
    """Repetition penalty, as in CTRL, arXiv 1909.05858; the other penalties, biases and a grammar's mask.

    An array of no length is a wish that nobody has.
    """
    for token_id in range(len(divisors)):
        # Positive ones are divided, negative ones multiplied: the lower result, or, of a reward, the higher one.
        multiplied, divided = logits[token_id] * divisors[token_id], logits[token_id] / divisors[token_id]
        logits[token_id] = multiplied if (divided > multiplied) != is_reward else divided
    for token_id in range(len(penalties)):
        logits[token_id] -= penalties[token_id]
    for index in range(len(bias_ids)):
        logits[bias_ids[index]] += bias[index]
    for byte in range(len(mask)):
        if mask[byte] != 0xFF:
            for bit in range(min(8, len(logits) - 8 * byte)):
                if not mask[byte] >> bit & 1:
                    logits[8 * byte + bit] = -np.inf
