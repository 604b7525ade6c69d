"""Attention of any softmax kind over the paged cache: copies of what a step reads, and torch. Knows no family.

Layers may differ in heads, in the width of keys and of values, in how far back a token sees, and in sinks: scores that
take their share of a softmax and have no value. A page's row is as wide as the widest layer's.

Shapes: T tokens of the step, N query heads, G key-value heads, H width of a key's head, W of a value's, B decoding
sequences, S longest context.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from experts_service.transformers_backend.layer_attention import LayerAttention, Sight
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata
from router_service.attention.reference import Decodes, plan_decodes, runs

SCORE_BYTES = 2**28  # of the scores of a chunk's tokens that are in memory at once
GATHERED_BYTES = 2**30  # of keys and values that decoding sequences read at once, if one context alone is not longer


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A chunk of one prompt."""

    rows: slice  # its rows among the T tokens
    slots: torch.Tensor  # [S] of the context that any of its tokens sees
    mask: torch.Tensor  # [length, S] bool, true where a token sees a key


class PagedSdpa(AttentionBackend):
    """Gather and softmax, layer by layer as each is."""

    name = "copies of the context, transformers' layers"
    gathers = True

    def __init__(self, layers: Seq[LayerAttention], *, block_size: int, dtype: torch.dtype, device: torch.device):
        self.layers = tuple(layers)
        widths = max(layer.key_width for layer in layers), max(layer.value_width for layer in layers)
        self.layout = PageLayout((block_size, widths[0]), (block_size, widths[1]))
        self.max_gathered_tokens = GATHERED_BYTES // (sum(widths) * dtype.itemsize)
        self.dtype, self.device = dtype, device

    def plan(self, metadata: AttentionMetadata) -> SdpaPlan:
        """Where each layer reads and writes in the step."""
        return SdpaPlan(metadata, self)


class SdpaPlan(AttentionPlan):
    """How the tokens of one step attend."""

    def __init__(self, metadata: AttentionMetadata, backend: PagedSdpa) -> None:
        self._backend = backend
        self._write_slots = torch.from_numpy(metadata.write_slots).to(backend.device)  # [T]
        self._reads = {sight: _Reads(metadata, sight, backend) for sight in {layer.sight for layer in backend.layers}}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys [T, G, H] and values [T, G, W]."""
        for memory, rows in ((kv_cache.keys, keys), (kv_cache.values, values)):
            flat = rows.flatten(1)
            memory[layer].flatten(0, 1)[:, : flat.shape[1]].index_copy_(0, self._write_slots, flat)

    def read(
        self, layer: int, queries: torch.Tensor, kv_cache: KVCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over copies of what they see; `sinks` [N]. Returns [T, N, W]."""
        spec = self._backend.layers[layer]
        reads = self._reads[spec.sight]
        all_keys = kv_cache.keys[layer].flatten(0, 1)[:, : spec.key_width]  # [slots, G · H]
        all_values = kv_cache.values[layer].flatten(0, 1)[:, : spec.value_width]
        output = queries.new_empty(*queries.shape[:2], spec.value_dim)
        for prefill in reads.prefills:
            keys = all_keys.index_select(0, prefill.slots).view(-1, spec.num_kv_heads, spec.key_dim).transpose(0, 1)
            values = all_values.index_select(0, prefill.slots).view(-1, spec.num_kv_heads, spec.value_dim)
            values = values.transpose(0, 1)
            of_chunk = queries[prefill.rows]
            step = max(1, SCORE_BYTES // (4 * of_chunk.shape[1] * keys.shape[1]))
            for first in range(0, len(of_chunk), step):
                part = of_chunk[first : first + step]
                attended = _attend(
                    part.transpose(0, 1)[None],  # [1, N, length, H]
                    keys[None],
                    values[None],
                    prefill.mask[first : first + step],
                    spec.scaling,
                    sinks,
                )
                at = prefill.rows.start + first
                output[at : at + len(part)] = attended[0].transpose(0, 1)
        for decodes in reads.decodes:
            batch, context = decodes.slots.shape
            slots = decodes.slots.view(-1)
            keys = all_keys.index_select(0, slots).view(batch, context, spec.num_kv_heads, spec.key_dim)
            values = all_values.index_select(0, slots).view(batch, context, spec.num_kv_heads, spec.value_dim)
            attended = _attend(
                queries[decodes.rows].unsqueeze(2),  # [B, N, 1, H]
                keys.transpose(1, 2),
                values.transpose(1, 2),
                decodes.mask,
                spec.scaling,
                sinks,
            )
            output[decodes.rows] = attended.squeeze(2)
        return output


class _Reads:
    """What the tokens of a step see, of the layers that see alike."""

    def __init__(self, metadata: AttentionMetadata, sight: Sight, backend: PagedSdpa) -> None:
        self.prefills: list[_Prefill] = []
        rows: list[int] = []
        of_decodes: list[torch.Tensor] = []
        bounds = metadata.query_starts.tolist()
        for index, (row, end) in enumerate(pairwise(bounds)):
            positions = metadata.positions[row:end]
            firsts = sight.first(positions)
            keys = np.arange(firsts[0], positions[-1] + 1)
            slots = torch.from_numpy(metadata.slots(np.int64(index), keys))
            if end - row == 1:
                rows.append(row)
                of_decodes.append(slots)
                continue
            mask = torch.from_numpy((keys <= positions[:, None]) & (keys >= firsts[:, None]))
            self.prefills.append(_Prefill(slice(row, end), slots.to(backend.device), mask.to(backend.device)))
        self.decodes: list[Decodes] = [
            plan_decodes(rows[run], of_decodes[run], backend.dtype, backend.device)
            for run in runs([len(slots) for slots in of_decodes], backend.max_gathered_tokens)
        ]


def _attend(
    queries: torch.Tensor,  # [B, N, L, H]
    keys: torch.Tensor,  # [B, G, S, H]
    values: torch.Tensor,  # [B, G, S, W]
    mask: torch.Tensor | None,  # like [B, N, L, S]: true where seen, or what is added to scores
    scaling: float,
    sinks: torch.Tensor | None,  # [N]
) -> torch.Tensor:
    """Returns [B, N, L, W]."""
    if sinks is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    # The N / G query heads that share a key head stand as more queries of it: no key is repeated.
    grouped = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[3])  # [B, G, N / G · L, H]
    scores = grouped @ keys.transpose(2, 3) * scaling  # [B, G, N / G · L, S]
    scores = scores.view(*queries.shape[:3], -1)  # [B, N, L, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    sunk = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.softmax(torch.cat([scores, sunk], dim=-1), dim=-1)[..., :-1]
    attended = shares.reshape(*grouped.shape[:3], -1) @ values  # [B, G, N / G · L, W]
    return attended.view(*queries.shape[:3], -1)
