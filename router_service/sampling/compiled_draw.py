"""What `draw.py` says of a row as compiled loops over it. Knows probabilities and numbers; knows no tensor.

A float32 that is not negative is ordered as its bits are, its key. So the tokens are ranked by the digits of their
keys, from the highest down: 12 bits, then 9, then 9.

    sums and numbers of tokens by digit ──▶ the digit where the running sum passes its target ──▶ its tokens, next digit

One pass over the row finds the first digits of all, a second one the tokens of one digit, which are few as a rule.
After the last digit all are alike. Sums are in float64; where float32 could round the other way, no token is told.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experts_service.kernels.compiled.jit import AVAILABLE, kernel, pointer, take
from experts_service.kernels.compiled.routine import Routine, num_threads

if AVAILABLE:
    from numba import carray

IN_DOUBT = -1

# How far float32 was ever off in a share of a sum of 131,072 probabilities: 0.3e-6.
DOUBT = 2.0**-21
DOUBLE_DOUBT = 1e-10  # the same in float64, relative

_READ_BYTES = 40  # that a thread reads while it looks at one probability in every way

_MASS, _COUNT = 0, 1  # columns of sums
_FIRST, _NEXT = 1 << 12, 1 << 9  # digits
_LANES = 64  # sums that are added up side by side
_BLOCK = 64 * _LANES  # probabilities that are added up before anybody looks for a token

_Floats = NDArray[np.float32]
_Sums = NDArray[np.float64]
_Keys = NDArray[np.int32]


def draw_rows(
    probabilities: _Floats,  # [B, V]
    top_k: NDArray[np.int64],  # [B], 0: off
    top_p: _Sums,  # [B], 1: off
    min_p: _Sums,  # [B], 0: off
    uniforms: _Sums,  # [B]
) -> NDArray[np.int64]:
    """Draw a token from each row [B]; IN_DOUBT where float32 decides."""
    token_ids = np.empty(len(probabilities), np.int64)
    arrays = (probabilities, top_k, top_p, min_p, uniforms, token_ids)
    threads = num_threads(_READ_BYTES * probabilities.size, 0)
    _draw_rows.run(threads, *probabilities.shape, *(array.ctypes.data for array in arrays))
    return token_ids


@Routine
def _draw_rows(task):  # type: ignore[no-untyped-def]
    """Row by row."""
    num_rows, vocabulary = task[1], task[2]
    probabilities = carray(pointer(task[3]), (num_rows, vocabulary), np.float32)
    all_top_k = carray(pointer(task[4]), num_rows, np.int64)
    all_top_p, all_min_p, uniforms = (
        carray(pointer(task[5]), num_rows, np.float64),
        carray(pointer(task[6]), num_rows, np.float64),
        carray(pointer(task[7]), num_rows, np.float64),
    )
    token_ids = carray(pointer(task[8]), num_rows, np.int64)
    first, rest = np.empty((_FIRST, 2)), np.empty((_NEXT, 2))
    keys = np.empty(vocabulary, np.int32)
    while True:
        row = take(task)
        if row >= num_rows:
            return
        part, top_k, top_p, min_p = probabilities[row], all_top_k[row], all_top_p[row], all_min_p[row]
        if top_k == 0 and top_p == 1.0 and min_p == 0.0:
            token_ids[row] = _draw_in_order(part, uniforms[row])
            continue
        _sum_by_digit(part.view(np.int32), vocabulary, 18, _FIRST, first)
        k, p, floor = top_k if top_k < vocabulary else 0, np.float32(top_p), np.float32(min_p)
        token_ids[row] = _draw_ranked(part, first, rest, keys, k, np.float64(p), floor, uniforms[row])


@kernel
def _draw_in_order(probabilities: _Floats, number: float) -> int:
    """The token where the running sum, by id, passes its share of all."""
    width = len(probabilities)
    num_blocks = -(-width // _BLOCK)
    sums, lanes = np.empty(num_blocks), np.empty(_LANES)
    total = 0.0
    for block in range(num_blocks):
        sums[block] = _mass_from(probabilities[block * _BLOCK : (block + 1) * _BLOCK], np.float32(0.0), lanes)
        total += sums[block]
    target, before = number * total, 0.0
    for block in range(num_blocks):
        if before + sums[block] > target:
            for token_id in range(block * _BLOCK, min((block + 1) * _BLOCK, width)):
                after = before + probabilities[token_id]
                if after > target:
                    is_certain = before <= target * (1 - DOUBLE_DOUBT) and target * (1 + DOUBLE_DOUBT) < after
                    return token_id if is_certain else IN_DOUBT
                before = after
            return IN_DOUBT
        before += sums[block]
    return IN_DOUBT


@kernel
def _draw_ranked(
    probabilities: _Floats,
    first: _Sums,
    rest: _Sums,
    keys: _Keys,
    k: int,
    top_p: float,
    min_p: np.float32,
    number: float,
) -> int:
    """The token where the running sum, from the most likely down, passes its share of what the filters keep."""
    total = _mass_of_likely(probabilities, first, rest, keys, k, min_p)
    if top_p == 1.0:
        return _draw_within(probabilities, first, rest, keys, number, total, total)
    # Which token is the last one kept is seldom asked for: it moves the bounds by its own probability.
    low, high = max(0.0, (top_p - DOUBT) * total), (top_p + DOUBT) * total
    most = min(high + _most_at(first, high), total)
    token_id = _draw_within(probabilities, first, rest, keys, number, low, most)
    if token_id != IN_DOUBT:
        return token_id
    value, before, _, num_alike = _find(probabilities, first, rest, keys, _MASS, top_p * total)
    if num_alike == 0:
        return _draw_within(probabilities, first, rest, keys, number, low, total)
    before += value * _rank(value, before, num_alike, top_p * total)
    after = before + value
    is_kept = before == 0.0 or before < low  # the most likely one always is
    if is_kept and high <= after:
        return _draw_within(probabilities, first, rest, keys, number, after, after)
    return _draw_within(probabilities, first, rest, keys, number, low, min(high + value, total))


@kernel
def _draw_within(
    probabilities: _Floats, first: _Sums, rest: _Sums, keys: _Keys, number: float, low: float, high: float
) -> int:
    """The token of a number in [0, 1), where the tokens that are kept have a mass from `low` to `high`."""
    target = number * low
    value, before, _, num_alike = _find(probabilities, first, rest, keys, _MASS, target)
    if num_alike == 0:
        return IN_DOUBT
    rank = _rank(value, before, num_alike, target)
    before += rank * value
    if before > target * (1 - DOUBLE_DOUBT) or number * high * (1 + DOUBLE_DOUBT) >= before + value:
        return IN_DOUBT
    for token_id in range(len(probabilities)):  # equally likely ones are ranked by id
        if probabilities[token_id] == value:
            if rank == 0:
                return token_id
            rank -= 1
    return IN_DOUBT


@kernel
def _mass_of_likely(probabilities: _Floats, first: _Sums, rest: _Sums, keys: _Keys, k: int, min_p: np.float32) -> float:
    """Of what top_k (0: off) and min_p leave, at least the first."""
    floor = np.float32(min_p * _largest(probabilities)) if min_p > 0 else np.float32(0.0)
    if k > 0:
        value, before, num_before, _ = _find(probabilities, first, rest, keys, _COUNT, k - 1.0)
        if value >= floor:
            return before + (k - num_before) * value
    return _mass_from(probabilities, floor, np.empty(_LANES))


@kernel
def _largest(probabilities: _Floats) -> np.float32:
    keys, key = probabilities.view(np.int32), np.int32(0)
    for token_id in range(len(keys)):  # integers: what a NaN would be need not be asked
        key = max(key, keys[token_id])
    return np.int32(key).view(np.float32)


@kernel
def _mass_from(probabilities: _Floats, floor: np.float32, lanes: _Sums) -> float:
    """Of the tokens that have at least `floor`."""
    lanes[:] = 0.0
    width = len(probabilities) // _LANES * _LANES
    for start in range(0, width, _LANES):
        for lane in range(_LANES):
            one = probabilities[start + lane]
            lanes[lane] += one if one >= floor else np.float32(0.0)
    total = float(lanes.sum())
    for token_id in range(width, len(probabilities)):
        if probabilities[token_id] >= floor:
            total += probabilities[token_id]
    return total


@kernel
def _most_at(first: _Sums, mass: float) -> float:
    """No token has more where the running sum passes `mass`, or later."""
    digit, _, _ = _pass(first, _FIRST, _MASS, 0.0, 0.0, mass)
    return float(np.int32((digit + 1) << 18).view(np.float32))


@kernel
def _rank(value: float, before: float, num_alike: int, target: float) -> int:
    """Of tokens that are alike, the one with which the running sum passes `target`."""
    return max(0, min(num_alike - 1, int((target - before) / value)))


@kernel
def _find(
    probabilities: _Floats, first: _Sums, rest: _Sums, keys: _Keys, by: int, target: float
) -> tuple[float, float, float, int]:
    """Of the token where the running sum passes `target`: its probability; the mass and the number of all that have
    more; and how many have as much, itself included, or 0 where no running sum passes that."""
    digit, mass, count = _pass(first, _FIRST, by, 0.0, 0.0, target)
    if digit < 0:
        return 0.0, mass, count, 0
    number = _gather(probabilities.view(np.int32), len(probabilities), 18, _FIRST, digit, keys)
    for shift in (9, 0):
        _sum_by_digit(keys, number, shift, _NEXT, rest)
        digit, mass, count = _pass(rest, _NEXT, by, mass, count, target)
        if digit < 0:  # between two sums of the same in different order
            return 0.0, mass, count, 0
        number = _gather(keys, number, shift, _NEXT, digit, keys)
    return keys.view(np.float32)[0], mass, count, number


@kernel
def _sum_by_digit(keys: _Keys, number: int, shift: int, digits: int, sums: _Sums) -> None:
    """Fill `sums` [digits, 2] with the mass and the number of the first `number` tokens by a digit of their keys."""
    sums[:digits] = 0.0
    probabilities = keys.view(np.float32)
    last, mass, count = 0, 0.0, 0.0  # one sum for a run: else each token waits for the sum of the one before it
    for index in range(number):
        digit = (keys[index] >> shift) & (digits - 1)
        if digit != last:
            sums[last, _MASS] += mass
            sums[last, _COUNT] += count
            last, mass, count = digit, 0.0, 0.0
        mass += probabilities[index]
        count += 1.0
    sums[last, _MASS] += mass
    sums[last, _COUNT] += count


@kernel
def _pass(sums: _Sums, digits: int, by: int, mass: float, count: float, target: float) -> tuple[int, float, float]:
    """The digit where the running sum passes `target`, from the highest down, and both sums before it; -1: none."""
    for digit in range(digits - 1, -1, -1):
        if (mass + sums[digit, _MASS] if by == _MASS else count + sums[digit, _COUNT]) > target:
            return digit, mass, count
        mass += sums[digit, _MASS]
        count += sums[digit, _COUNT]
    return -1, mass, count


@kernel
def _gather(keys: _Keys, number: int, shift: int, digits: int, digit: int, found: _Keys) -> int:
    """Write those of the first `number` keys that have a digit to `found`, which may be `keys`. Returns how many."""
    count = 0
    for index in range(number):
        found[count] = keys[index]
        count += (keys[index] >> shift) & (digits - 1) == digit  # no branch: half of them may be the digit's
    return count
