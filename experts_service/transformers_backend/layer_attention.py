"""What softmax attention is in one layer, as a coordinator's cache has to know it. Knows no tensor and no family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.checkpoint.architecture import Architecture


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

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    sight: Sight
    has_sinks: bool = False
    index_dim: int = 0  # of the key by which an indexer chooses which tokens are seen; 0: there is none
    index_heads: int = 0  # of the indexer

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.num_kv_heads * self.key_dim

    @property
    def kept_width(self) -> int:
        """The same with the indexer's, which lies behind them."""
        return self.key_width + self.index_dim

    @property
    def value_width(self) -> int:
        """Numbers of a token's values."""
        return self.num_kv_heads * self.value_dim


def with_cache_of(architecture: Architecture, layers: Sequence[LayerAttention]) -> Architecture:
    """The same with the keys and values that a page has: one is as wide, in every layer, as the widest needs."""
    heads = max(layer.num_kv_heads for layer in layers)
    width = max(layer.kept_width for layer in layers) + max(layer.value_width for layer in layers)
    # torch keeps scores where values are not as wide as keys, and has all in fp32 then.
    widened = [_copied(layer) for layer in layers if layer.key_dim != layer.value_dim and not layer.has_sinks]
    return replace(
        architecture,
        num_kv_heads=heads,
        head_dim=-(-width // (2 * heads)),
        has_scores=bool(widened) or any(layer.has_sinks or layer.index_dim for layer in layers),
        widened=max(widened, default=0),
        index_heads=max(layer.index_heads for layer in layers),
    )


def _copied(layer: LayerAttention) -> int:
    """Numbers of a token of which torch makes copies: keys are scaled, then they or the values are laid out anew. Those
    that several heads share are before that repeated for each, and lie right then.
    """
    keys, values = layer.num_heads * layer.key_dim, layer.num_heads * layer.value_dim
    return keys + (max(keys, values) if layer.num_heads == layer.num_kv_heads else keys + values)
