"""Angles of rotary position embedding, arXiv 2104.09864, stretched or not. Knows positions; knows no layer.

Formulas and their order are those of transformers' modeling_rope_utils.py, so that the bits are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope


class Rotary:
    """Those of one model."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: of what is rotated."""
        self._dtype = dtype
        scaling = architecture.rope_scaling
        self._factor = scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0
        self._inverse_frequencies = inverse_frequencies(  # [H / 2]
            architecture.rope_theta, architecture.head_dim, scaling, device
        )

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, H] of `positions` [T], halves laid out as on the hub."""
        angles = positions.unsqueeze(1).float() * self._inverse_frequencies  # [T, H / 2]
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos(), angles.sin()
        if self._factor != 1:
            cosines, sines = cosines * self._factor, sines * self._factor
        return cosines.to(self._dtype), sines.to(self._dtype)


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Of each pair of numbers of a head [H / 2], fp32."""
    half = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device)
    frequencies = 1.0 / (theta ** (half.float() / head_dim))
    match scaling:
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope():
            return _llama3(frequencies, scaling)
        case YarnRope():
            return _yarn(theta, head_dim, scaling, device)
    return frequencies


def _llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    length = rope.original_max_position_embeddings
    longest, shortest = length / rope.low_freq_factor, length / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    return torch.where((wavelengths < shortest) | (wavelengths > longest), stretched, between)


def _yarn(theta: float, head_dim: int, rope: YarnRope, device: torch.device) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """That turns so many times within the original context."""
        length = rope.original_max_position_embeddings
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the reference: no division by zero
    powers = theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)  # [H / 2]
    plain, stretched = 1.0 / powers, 1.0 / (rope.factor * powers)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return stretched * (1 - kept) + plain * kept
