"""What a way to attend has to offer: the seam between decoder, cache and kernels. Knows none of them.

A backend says how a page of the cache is laid out, and makes a plan of each step that every layer uses. Whatever it
is, a token sees itself and what comes before it in its own sequence, no further back than the sliding window; slots
that were not written, and blocks of others, may hold anything, NaN included, and reach nobody.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata


class AttentionPlan(ABC):
    """How the tokens of one step attend."""

    @abstractmethod
    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""

    @abstractmethod
    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache
    ) -> torch.Tensor:
        """Write the new keys and values, then read what each token sees. Returns [T, N, H]."""
        self.write(layer, keys, values, kv_cache)
        return self.read(layer, queries, kv_cache)


class AttentionBackend(ABC):
    """One way to attend."""

    name: str  # as the log, benchmarks, metrics and `system_fingerprint` have it
    layout: PageLayout
    gathers: bool  # copies what it reads

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """For the layers of one step."""
