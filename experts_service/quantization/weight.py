"""One matrix as small numbers times scales, and what it stands for. Knows nothing of how a file or a kernel packs them.

    weight[o, i] = (codes[o, i] - zero_points[o, g]) · scales[o, g]      g the group of column i

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts_service.memory import mapped

_WIDE_BYTES = 2**24  # of rows in fp32 at once, while a matrix is widened


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A matrix [out, in], as kernels take it in place of a tensor."""

    codes: Tensor  # [O, I] int8, or float8_e4m3fn
    scales: Tensor  # [O, G] fp32; a scale of several rows is there for each of them
    zero_points: Tensor | None  # [O, G] int16; None: all are 0
    bits: int  # of a code: 8, or 4 in int8 from -8 to 7
    group_size: int  # neighbouring columns of one group; the last group may have fewer
    dtype: torch.dtype  # of the rows that it is multiplied with, and of what it is widened to
    input_groups: Tensor | None = None  # [I] int32, the group of each column where groups are not neighbours

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.codes.device

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return self.scales.shape[1]

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zero_points=None if self.zero_points is None else self.zero_points.to(device),
            input_groups=None if self.input_groups is None else self.input_groups.to(device),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] in `dtype`: computed in fp32, each number rounded once."""
        out_features, in_features = self.shape
        widened = _empty(self.shape, dtype, self.device)
        rows = max(1, _WIDE_BYTES // (4 * in_features))
        for part in (slice(start, start + rows) for start in range(0, out_features, rows)):
            wide = self.codes[part].float()
            if self.zero_points is not None:
                wide -= self._of_columns(self.zero_points[part].float())
            widened[part] = wide.mul_(self._of_columns(self.scales[part]))
        return widened

    def _of_columns(self, of_groups: Tensor) -> Tensor:
        """[O, G] → [O, I], or [O, 1] where there is one group."""
        if self.num_groups == 1:
            return of_groups
        if self.input_groups is not None:
            return of_groups[:, self.input_groups]
        return of_groups.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


Weight = Tensor | QuantizedWeight


def dense(weight: Weight) -> Tensor:
    """What a kernel multiplies that has none of its own for small numbers."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(weight.dtype)


def stacked(weights: Sequence[Weight]) -> Weight:
    """Matrices of the same inputs, below one another: small numbers where all have them alike, else widened."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) < len(weights) or any(not _alike(weight, quantized[0]) for weight in quantized):
        return torch.cat([dense(weight) for weight in weights])
    zero_points = None
    if any(weight.zero_points is not None for weight in quantized):
        zero_points = torch.cat(
            [
                weight.scales.new_zeros(weight.scales.shape, dtype=torch.int16)
                if weight.zero_points is None
                else weight.zero_points
                for weight in quantized
            ]
        )
    return replace(
        quantized[0],
        codes=torch.cat([weight.codes for weight in quantized]),
        scales=torch.cat([weight.scales for weight in quantized]),
        zero_points=zero_points,
    )


def _alike(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether they differ in nothing but their rows."""
    if (one.input_groups is None) is not (other.input_groups is None):
        return False
    if one.input_groups is not None and other.input_groups is not None:
        if not torch.equal(one.input_groups, other.input_groups):
            return False
    elif one.group_size != other.group_size:
        return False
    return (
        one.codes.dtype is other.codes.dtype
        and one.dtype is other.dtype
        and one.bits == other.bits
        and one.num_groups == other.num_groups
    )


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In a mapping of its own on a CPU, as all weights are."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return mapped(shape.numel() * dtype.itemsize).view(dtype).view(shape)
