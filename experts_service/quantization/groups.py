"""Puts the inputs of a matrix in an order in which those that share a scale are neighbours. Knows no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from experts_service.quantization.weight import QuantizedWeight


def group_width(weight: QuantizedWeight, step: int) -> int:
    """Inputs of its largest group, rounded up to whole steps."""
    if weight.num_groups == 1:
        size = weight.shape[1]
    elif weight.input_groups is None:
        size = weight.group_size
    else:
        size = int(torch.bincount(weight.input_groups).max())
    return -(-size // step) * step


def grouped_columns(weight: QuantizedWeight, width: int) -> Tensor | None:
    """The input of each k [K] once every group has `width` of them; `in_features`: none, the group was filled up.

    None: they stay as they are, and nothing but the end of the last group is to be filled up.
    """
    if weight.num_groups == 1 or (weight.input_groups is None and weight.group_size == width):
        return None
    in_features, device = weight.shape[1], weight.device
    groups = weight.input_groups
    if groups is None:
        groups = torch.arange(in_features, device=device) // weight.group_size
    sizes = torch.bincount(groups, minlength=weight.num_groups)
    ordered = torch.full((weight.num_groups, width), in_features, device=device)
    ordered[torch.arange(width, device=device) < sizes[:, None]] = torch.argsort(groups, stable=True)
    return ordered.flatten()
