"""The memory of keys and values, in pages, one pair of tensors per layer. Knows neither sequences nor a page's inside.

A page is a block of the block manager's. Block 0 is the null block: padding reads it, nobody writes it, and it stays
zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How the attention backend wants a page, as shapes of which both are G · block_size · H numbers."""

    keys: Shape
    values: Shape


class KVCache:
    """Keys and values of every layer, each [P pages, *the backend's layout]."""

    def __init__(
        self, num_layers: int, num_blocks: int, layout: PageLayout, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for `num_blocks` and the null block."""
        self.keys = _zeros((num_layers, 1 + num_blocks, *layout.keys), dtype, device)  # [L, P, …]
        self.values = _zeros((num_layers, 1 + num_blocks, *layout.values), dtype, device)  # [L, P, …]


def _zeros(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU their pages are taken from the system only when written, which torch.zeros does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
