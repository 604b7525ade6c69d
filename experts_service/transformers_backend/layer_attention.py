"""What softmax attention is in one layer, as a coordinator's cache has to know it. Knows no tensor and no family."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sight:
    """How far back a token sees."""

    window: int | None = None  # tokens, itself included
    chunk: int | None = None  # tokens; it sees those of its own chunk

    def first(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first position that each of these sees."""
        if self.chunk is not None:
            return positions // self.chunk * self.chunk
        if self.window is not None:
            return np.maximum(positions - self.window + 1, 0)
        return np.zeros_like(positions)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer's attention is."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    sight: Sight

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.num_kv_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Numbers of a token's values."""
        return self.num_kv_heads * self.value_dim
