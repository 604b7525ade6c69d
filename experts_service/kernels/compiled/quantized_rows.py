"""Rows of bf16 as integers of 16 bits, as kernels for weights of few bits read them. Knows no weight.

A block of a row has one scale, a power of two: the largest that leaves its largest number below 2**15. A bf16 has eight
digits, so whatever is more than a 128th of a block's largest number is exact, and what is smaller is off by a 32,640th
of that number at most. bf16 itself rounds the largest to a 512th.

    words   [K / 2]     int32    of each block its upper digits, then its lower ones, a byte each (DIGITS); else of each
                                 four k a pair of int16 of the first and third, then one of the others
    scales  [K / block] float32  NaN where a number of the block is not finite
    sums    [K / block] int32    of the block's integers
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from experts_service.kernels.compiled.jit import AVAILABLE, bits, from_bits, pointer, take, widen
from experts_service.kernels.compiled.quantized_tile import DIGITS
from experts_service.kernels.compiled.routine import Routine, Task, num_threads

if AVAILABLE:
    from numba import carray

_ROUNDER = np.float32(12582912.0)  # 1.5 · 2**23: what is added to it is rounded to an integer, in the lowest bits
_ROUNDER_BITS = np.int32(0x4B400000)
_NAN = np.float32(np.nan)
_ZERO, _ONE, _SEVEN, _EIGHT, _HALF, _EXPONENT = map(np.int32, (0, 1, 7, 8, 128, 23))
_MAGNITUDE, _INFINITY = np.int32(0x7FFF), np.int32(0x7F80)  # of a bf16's bits
_LEAST_EXPONENT = np.int32(15)  # of a block, biased: its scale is a normal float32; below 2**-112 digits are lost
_SCALE = np.int32(14)  # bits below the highest of a number
_INVERSE = np.int32(2 * 127 + 14)
_PASSES = 4  # reading, and what is done to each number, in numbers that are multiplied


def row_words(block: int, blocks: int) -> int:
    """How many int32 a row takes."""
    return blocks * (block // 2 + 2)


def quantize_task(x: Tensor, block: int, blocks: int, rows: Tensor) -> Task:
    """What writes `rows` [R, row_words] int32 of `x` [R, K] bf16, without gaps; zeros make up the last block."""
    threads = num_threads(2 * x.numel(), _PASSES * x.numel())
    arguments = (x.data_ptr(), *x.shape, block, blocks, rows.data_ptr(), row_words(block, blocks))
    return Task(_quantize, threads, arguments, (x, rows))


def load_kernels() -> None:
    """Compile it now, or read what was compiled."""
    _quantize.load()


@Routine
def _quantize(task):  # type: ignore[no-untyped-def]
    """Row by row."""
    x_at, num_rows, width, block, blocks, rows_at, words = task[1], task[2], task[3], task[4], task[5], task[6], task[7]
    x = carray(pointer(x_at), (num_rows, width), np.uint16)
    integers = carray(pointer(rows_at), (num_rows, words), np.int32)
    floats = carray(pointer(rows_at), (num_rows, words), np.float32)
    shorts = carray(pointer(rows_at), (num_rows, 2 * words), np.int16)
    octets = carray(pointer(rows_at), (num_rows, 4 * words), np.uint8)
    numbers = np.zeros(block, np.int32)
    while True:
        row = take(task)
        if row >= num_rows:
            return
        for b in range(blocks):
            first = b * block
            count = min(block, width - first)
            largest = _ZERO
            for k in range(count):
                largest = max(largest, np.int32(x[row, first + k]) & _MAGNITUDE)
            exponent = max((largest + _ONE) >> _SEVEN, _LEAST_EXPONENT)
            scale = from_bits((exponent - _SCALE) << _EXPONENT)
            inverse = from_bits((_INVERSE - exponent) << _EXPONENT)
            if largest >= _INFINITY:
                scale = _NAN
                numbers[:] = 0
            else:
                for k in range(count):
                    numbers[k] = bits(widen(x[row, first + k]) * inverse + _ROUNDER) - _ROUNDER_BITS
                numbers[count:] = 0
            total = _ZERO
            for k in range(block):
                total += numbers[k]
            if DIGITS:
                uppers, lowers = octets[row, 2 * first :], octets[row, 2 * first + block :]
                for k in range(block):
                    uppers[k] = np.uint8((numbers[k] + _HALF) >> _EIGHT)
                    lowers[k] = np.uint8(numbers[k])
            else:
                for k in range(block):
                    place = first + (k & 1) * (block // 2) + 2 * (k // 4) + ((k & 2) >> 1)
                    shorts[row, place] = np.int16(numbers[k])
            floats[row, blocks * (block // 2) + b] = scale
            integers[row, blocks * (block // 2 + 1) + b] = total
