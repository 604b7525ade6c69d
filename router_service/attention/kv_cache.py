"""The memory of keys and values, in pages, one pair of tensors per layer. Knows neither sequences nor a page's inside.

A page is a block of the block manager's. Block 0 is the null block: padding reads it, nobody writes it, and it stays
zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from experts_service.memory import mapped

Shape = tuple[int, ...]


IN_8_BITS = ", keys and values in 8 bits"  # what names of backends end with that keep them so


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How the attention backend wants a page, as shapes of which both are G · block_size · H numbers.

    Or as many codes and their scales: what they are of, and where, is the backend's.
    """

    keys: Shape
    values: Shape
    dtype: torch.dtype | None = None  # None: what the model computes in


class KVCache:
    """Keys and values of every layer, each [P pages, *the backend's layout]."""

    def __init__(
        self, num_layers: int, num_blocks: int, layout: PageLayout, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for `num_blocks` and the null block; `dtype` is what the model computes in."""
        dtype = layout.dtype or dtype
        self.keys = _zeros((num_layers, 1 + num_blocks, *layout.keys), dtype, device)  # [L, P, …]
        self.values = _zeros((num_layers, 1 + num_blocks, *layout.values), dtype, device)  # [L, P, …]


def _zeros(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU in pages that are taken from the system only when written, which torch.zeros does at once.

    Huge ones, and vectors begin with a cache line: read page by page in any order, that is a third faster.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return mapped(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
