"""Widens MXFP4: floats of 4 bits (e2m1), two in a byte, with a power of two for each 32 of a row. Reads no file.

O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import CheckpointError

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))  # by code
_BIAS, _NOT_A_NUMBER = 127, 255  # of an exponent
_PAIRS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}  # what two of these are read as at once
_WIDE_BYTES = 2**24  # of rows at once


def widen_mxfp4(name: str, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """`codes` [O, I / 32, 16] and `scales` [O, I / 32], both uint8, into `out` [I, O], in bf16 or fp32.

    Every number is exact, but for one smaller than any of `out`'s. Raises CheckpointError where a scale is no number.
    """
    if (scales == _NOT_A_NUMBER).any():
        raise CheckpointError(f"{name!r}: one of its scales is not a finite number; the file is damaged.")
    outputs, groups, _ = codes.shape
    values = torch.tensor(_VALUES, dtype=out.dtype)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # [256, 2], by byte
    pairs = pairs.view(_PAIRS[out.dtype])[:, 0]
    factors = torch.ldexp(torch.ones(_NOT_A_NUMBER), torch.arange(_NOT_A_NUMBER) - _BIAS)  # by scale
    rows = max(1, _WIDE_BYTES // (out.itemsize * out.shape[0]))
    for part in (slice(start, start + rows) for start in range(0, outputs, rows)):
        wide = pairs.index_select(0, codes[part].flatten().int()).view(out.dtype).view(-1, groups, 32)
        wide *= factors[scales[part].int()].to(out.dtype)[..., None]
        out[:, part] = wide.flatten(1).t()
