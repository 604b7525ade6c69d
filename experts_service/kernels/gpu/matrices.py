"""Matrices of one shape as the kernels of products.py read them: as they were loaded, or in small numbers with scales.

    weights  [E, N, K]   in the rows' dtype
             [E, N, K']  a byte each: integers around 0 or FP8, in whole blocks of k
             [E, N, K'/2] of 4 bits: of each 32 k the first 16 in the lower halves of bytes, the others in the upper

Knows tensors; knows no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.quantization.groups import group_width, grouped_columns
from experts_service.quantization.weight import QuantizedWeight, Weight, dense, stacked

PLAIN, INT8, INT4, FLOAT8 = 0, 8, 4, -8  # how weights are stored
HALF = 16  # numbers of 4 bits whose partners follow them
_MIDDLE = 8  # of 4 bits: what stands for 0
_FLOAT8_FACTOR = 256.0  # between FP8's numbers and those that its bits are in float16
_NOT_A_NUMBER = 0x7F  # of FP8, but for the sign
_MOST_PADDED = 2  # times the inputs: groups of very different sizes are not filled up to the largest
_MOST_BLOCK, _LEAST_BLOCK = 128, 16  # k of a block; a tensor core takes no fewer
_MOST_FP32_BLOCK = 32  # no tensor core multiplies them: more would not fit registers, nor the 99 KiB of small cards
_MOST_BYTES = 256  # of a block of plain weights


@dataclass(frozen=True, slots=True)
class Matrices:
    """E matrices [N, K], for rows of `dtype`."""

    weights: Tensor
    scales: Tensor | None  # [E, G, N] bf16 where that is exact, else fp32; None: plain
    zeros: Tensor | None  # [E, G, N] int16, what stands for 0; None: 0, or of 4 bits 8
    columns: Tensor | None  # [E, K'] int32, the input of each k; `in_features`: none. None: as they are
    kind: int
    dtype: torch.dtype
    in_features: int  # K
    width: int  # K'
    block: int  # k of which parts of a sum are made, and groups with a scale
    blocks_of_group: int  # 0: all are one group

    @classmethod
    def pack(cls, weights: Sequence[Sequence[Weight]]) -> Matrices:
        """Copies of `weights`, matrices below one another that make up [N, K] each, all of one dtype and device.

        In small numbers where all have them alike, else widened.
        """
        if all(isinstance(part, QuantizedWeight) for parts in weights for part in parts):
            small = [one for one in map(stacked, weights) if isinstance(one, QuantizedWeight)]
            if len(small) == len(weights) and _are_alike(small):
                return cls._pack_small(small)
        first = weights[0][0]
        in_features = first.shape[1]
        return cls(
            weights=_together([lambda parts=parts: dense(stacked(parts)) for parts in weights]),  # type: ignore[misc]
            scales=None,
            zeros=None,
            columns=None,
            kind=PLAIN,
            dtype=first.dtype,
            in_features=in_features,
            width=in_features,
            block=min(_power_of_two(in_features), _MOST_BYTES // first.dtype.itemsize),
            blocks_of_group=0,
        )

    @classmethod
    def _pack_small(cls, weights: Sequence[QuantizedWeight]) -> Matrices:
        first = weights[0]
        kind = _kind(first)
        group = max(group_width(weight, _step(kind)) for weight in weights)
        if first.num_groups == 1:
            block = min(_power_of_two(group), most_block(first.dtype))
            group = -(-group // block) * block
        else:
            block = min(group & -group, most_block(first.dtype))
        width = group * first.num_groups
        in_order = [grouped_columns(weight, group) for weight in weights]
        columns = None
        if any(one is not None for one in in_order):
            as_they_are = torch.arange(width, device=first.device).clamp_(max=first.shape[1])
            columns = torch.stack([as_they_are if one is None else one for one in in_order]).int()
        scales = torch.stack([_scales(weight) for weight in weights]).transpose(1, 2).contiguous()
        narrow = scales.bfloat16()
        zeros = None
        if any(weight.zero_points is not None for weight in weights):
            zeros = torch.stack([_zeros(weight, kind) for weight in weights]).transpose(1, 2).contiguous()
        return cls(
            weights=_together(
                [
                    lambda weight=weight, one=one: _codes(weight, one, width, kind)  # type: ignore[misc]
                    for weight, one in zip(weights, in_order, strict=True)
                ]
            ),
            scales=narrow if torch.equal(narrow.float().nan_to_num(), scales.nan_to_num()) else scales,
            zeros=zeros,
            columns=columns,
            kind=kind,
            dtype=first.dtype,
            in_features=first.shape[1],
            width=width,
            block=block,
            blocks_of_group=0 if first.num_groups == 1 else group // block,
        )

    @property
    def num_matrices(self) -> int:
        """E."""
        return self.weights.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weights.shape[1]


def most_block(dtype: torch.dtype) -> int:
    """Of small numbers: k that are widened and multiplied at once, with rows of `dtype`."""
    return _MOST_FP32_BLOCK if dtype == torch.float32 else _MOST_BLOCK


def stays_small(weight: Weight) -> TypeGuard[QuantizedWeight]:
    """Whether it is kept in small numbers: all are whose groups are of about one size."""
    if not isinstance(weight, QuantizedWeight):
        return False
    padded = group_width(weight, _step(_kind(weight))) * weight.num_groups
    return padded <= max(_MOST_PADDED * weight.shape[1], 2 * HALF)


def _are_alike(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether one kernel multiplies all of them."""
    if len({(_kind(weight), weight.dtype, weight.num_groups) for weight in weights}) > 1:
        return False
    widths = [group_width(weight, _step(_kind(weight))) for weight in weights]
    most = max(widths) * weights[0].num_groups
    return all(map(stays_small, weights)) and most <= max(_MOST_PADDED * weights[0].shape[1], 2 * HALF)


def _kind(weight: QuantizedWeight) -> int:
    return FLOAT8 if weight.codes.dtype is not torch.int8 else weight.bits


def _step(kind: int) -> int:
    """What a group's k are a multiple of."""
    return 2 * HALF if kind == INT4 else _LEAST_BLOCK


def _power_of_two(number: int) -> int:
    """The next one, as large as a block has to be at least."""
    return max(1 << (number - 1).bit_length(), 2 * HALF)


def _codes(weight: QuantizedWeight, columns: Tensor | None, width: int, kind: int) -> Tensor:
    """[N, K'], or of 4 bits [N, K' / 2]."""
    codes = weight.codes.view(torch.int8)
    codes = F.pad(codes, (0, width - codes.shape[1])) if columns is None else F.pad(codes, (0, 1))[:, columns]
    if kind != INT4:
        return codes.view(torch.uint8) if kind == FLOAT8 else codes
    lower, upper = codes.add(_MIDDLE).view(torch.uint8).view(len(codes), -1, 2, HALF).unbind(2)
    return (lower | upper << 4).flatten(1)


def _scales(weight: QuantizedWeight) -> Tensor:
    """[N, G] fp32. A group with a code of FP8 that is no number has none: a sum with it is none either."""
    if weight.codes.dtype is torch.int8:
        return weight.scales
    scales = weight.scales * _FLOAT8_FACTOR
    broken = weight.codes.view(torch.uint8) & _NOT_A_NUMBER == _NOT_A_NUMBER
    if not broken.any():
        return scales
    rows, inputs = broken.nonzero(as_tuple=True)
    scales[rows, 0 if weight.num_groups == 1 else inputs // weight.group_size] = torch.nan
    return scales


def _zeros(weight: QuantizedWeight, kind: int) -> Tensor:
    """[N, G]."""
    middle = _MIDDLE if kind == INT4 else 0
    if weight.zero_points is None:
        return torch.full_like(weight.scales, middle, dtype=torch.int16)
    return weight.zero_points + middle


def _together(parts: Sequence[Callable[[], Tensor]]) -> Tensor:
    """All in one tensor [E, …]; only one is there twice at a time."""
    first = parts[0]()
    together = first.new_empty(len(parts), *first.shape)
    together[0] = first
    del first
    for place, part in enumerate(parts[1:], 1):
        together[place] = part()
    return together
