"""Attention over pages where they lie, by our kernels for CPUs, of layers that are alike but for how far tokens see.

Layers of unlike heads, keys wider than values, chunks and indexers are `PagedSdpa`'s.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cluster.checkpoint.architecture import Architecture
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.tile import FMA
from experts_service.kernels.kernel import Kernel
from experts_service.transformers_backend.layer_attention import LayerAttention
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata

if TYPE_CHECKING:
    from router_service.attention.paged import PagedAttention, PagedPlan

# T tokens of the step, N query heads, G key-value heads, H width of a head


class PagedLayers(AttentionBackend):
    """A backend of ours for each kind of layer, over pages that are laid out alike."""

    gathers = False

    def __init__(self, of_layers: Seq[PagedAttention]) -> None:
        """`of_layers`: the backend of each; layers of one kind share it."""
        self.name, self.layout = of_layers[0].name, of_layers[0].layout
        self._of_layers = tuple(of_layers)

    def plan(self, metadata: AttentionMetadata) -> PagedLayersPlan:
        """Units of work of each kind of layer."""
        plans = {backend: backend.plan(metadata) for backend in dict.fromkeys(self._of_layers)}
        return PagedLayersPlan([plans[backend] for backend in self._of_layers])


class PagedLayersPlan(AttentionPlan):
    """How the tokens of one step attend."""

    def __init__(self, of_layers: Seq[PagedPlan]) -> None:
        self._of_layers = of_layers

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""
        self._of_layers[layer].write(layer, keys, values, kv_cache)

    def read(
        self, layer: int, queries: torch.Tensor, kv_cache: KVCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""
        return self._of_layers[layer].read(layer, queries, kv_cache, sinks)


def paged_layers(
    layers: Seq[LayerAttention],
    architecture: Architecture,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel,
) -> PagedLayers | None:
    """None where kernels of ours cannot compute all of them. `architecture` has the sizes of the cache."""
    first = layers[0]
    sizes = (first.num_heads, first.num_kv_heads, first.key_dim, first.key_dim)
    if not AVAILABLE or any(
        layer.index_dim
        or layer.sight.chunk is not None
        or (layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim) != sizes
        for layer in layers
    ):
        return None
    from router_service.attention.paged import BEST, PagedAttention, is_served, warm_up

    architecture = replace(architecture, num_heads=first.num_heads, num_kv_heads=first.num_kv_heads)
    architecture = replace(architecture, head_dim=first.key_dim)
    if not is_served(architecture, block_size, dtype, device):
        return None
    arithmetic = FMA if kernel is Kernel.FMA else BEST
    warm_up(dtype, arithmetic)
    kinds = {
        (layer.sight, layer.scaling): PagedAttention(
            replace(architecture, sliding_window=layer.sight.window),
            block_size=block_size,
            arithmetic=arithmetic,
            scaling=layer.scaling,
        )
        for layer in layers
    }
    return PagedLayers([kinds[layer.sight, layer.scaling] for layer in layers])
