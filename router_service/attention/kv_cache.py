"""The memory of keys and values, in blocks, one pair of tensors per layer. Knows slots; knows nothing of sequences.

Slot s of a layer is row s of its two tensors; block b of size n is the slots b·n … b·n + n - 1. Block 0 is the null
block: padding reads it, nobody writes it, and it stays zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cluster.checkpoint.architecture import Architecture


class KVCache:
    """Keys and values of every layer, each [S slots, G kv heads, H head_dim].

    The null block is zero because masked values are read as well, and 0 · NaN would not be 0. All other slots are
    written before they are read.
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
        """Room for `num_blocks` and the null block."""
        self.block_size = block_size
        num_slots = (1 + num_blocks) * block_size
        shape = (architecture.num_layers, num_slots, architecture.num_kv_heads, architecture.head_dim)
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU their pages are taken from the system only when written, which torch.zeros does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
