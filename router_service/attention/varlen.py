"""Attention on a GPU over pages where they lie: torch's `varlen_attn`, for prompts, decoding and windows in one call.

A page is [slot, G, H], 256 slots of it, which is what the built-in kernel (FlashAttention 2) takes. Contexts are not
split: the kernel would choose splits by the longest context of a step, and a token's bits would depend on neighbours.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim, B sequences, P blocks of the longest.
"""

from __future__ import annotations

import torch
from torch.nn.attention.varlen import varlen_attn

from cluster.checkpoint.architecture import Architecture
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata

PAGE = 256  # slots
_WITHOUT_SPLITS = 1


def is_served(architecture: Architecture, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes this model, and the card the kernel."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and block_size == PAGE
        and architecture.head_dim <= 256
        and architecture.head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class VarlenAttention(AttentionBackend):
    """torch.nn.attention.varlen."""

    name = "pages in place, varlen_attn"
    gathers = False

    def __init__(self, architecture: Architecture, *, device: torch.device) -> None:
        page = (PAGE, architecture.num_kv_heads, architecture.head_dim)
        self.layout = PageLayout(page, page)
        self.device = device
        window = architecture.sliding_window
        self.window = (-1 if window is None else window - 1, 0)  # tokens that are seen before one's own, and after
        self.enable_gqa = architecture.num_kv_heads != architecture.num_heads

    def plan(self, metadata: AttentionMetadata) -> VarlenPlan:
        """The metadata on the device."""
        return VarlenPlan(metadata, self)


class VarlenPlan(AttentionPlan):
    """What every layer of one step is called with."""

    def __init__(self, metadata: AttentionMetadata, backend: VarlenAttention) -> None:
        self._backend = backend
        self._write_slots = torch.from_numpy(metadata.write_slots).to(backend.device)  # [T]
        self._query_starts = torch.from_numpy(metadata.query_starts).to(backend.device)  # [B + 1]
        self._context_lengths = torch.from_numpy(metadata.context_lengths).to(backend.device)  # [B]
        self._block_tables = torch.from_numpy(metadata.block_tables).to(backend.device)  # [B, P]
        self._most_queries = int((metadata.query_starts[1:] - metadata.query_starts[:-1]).max())
        self._longest = int(metadata.context_lengths.max())

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""
        kv_cache.keys[layer].flatten(0, 1).index_copy_(0, self._write_slots, keys)
        kv_cache.values[layer].flatten(0, 1).index_copy_(0, self._write_slots, values)

    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""
        attended = varlen_attn(
            queries,
            kv_cache.keys[layer],
            kv_cache.values[layer],
            self._query_starts,
            None,
            self._most_queries,
            self._longest,
            window_size=self._backend.window,
            enable_gqa=self._backend.enable_gqa,
            seqused_k=self._context_lengths,
            block_table=self._block_tables,
            num_splits=_WITHOUT_SPLITS,
        )
        assert isinstance(attended, torch.Tensor), "no auxiliary output was asked for"
        return attended
