"""The memory of keys and values, in blocks, one pair of tensors per layer. Knows slots; knows nothing of sequences.

Slot s of a layer is row s of its two tensors; block b of size n is the slots b·n … b·n + n - 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cluster.architecture import Architecture


class KVCache:
    """Keys and values of every layer, each [S slots, G kv heads, H head_dim].

    The memory is zeroed: padding reads slots that were never written, and 0 · NaN would not be 0.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (architecture.num_layers, num_blocks * block_size, architecture.num_kv_heads, architecture.head_dim)
        self._keys = _zeros(shape, dtype, device)  # [L, S, G, H]
        self._values = _zeros(shape, dtype, device)  # [L, S, G, H]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values` [T, G, H] of T tokens at `slots` [T]."""
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [*slots.shape, G, H] at `slots`, as copies."""
        shape = (*slots.shape, *self._keys.shape[2:])
        flat = slots.reshape(-1)
        keys = self._keys[layer].index_select(0, flat)
        values = self._values[layer].index_select(0, flat)
        return keys.view(shape), values.view(shape)

    def erase(self, blocks: list[int]) -> None:
        """Zero these blocks: what they hold is not finite, and padding may read them."""
        for block in blocks:
            slots = slice(block * self.block_size, (block + 1) * self.block_size)
            self._keys[:, slots] = 0
            self._values[:, slots] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU their pages are taken from the system only when written, which torch.zeros does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
