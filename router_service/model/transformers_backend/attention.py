"""Attention of any softmax kind over the paged cache: copies of what a step reads, and torch. Knows no family.

Layers may differ in heads, in the width of keys and of values, in how far back a token sees, and in sinks: scores that
take their share of a softmax and have no value. A page's row is as wide as the widest layer's.

Shapes: T tokens of the step, N query heads, G key-value heads, H width of a key's head, W of a value's, B decoding
sequences, S longest context.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cluster.planning.step_memory import MAX_SCORES
from experts_service.transformers_backend.layer_attention import LayerAttention, Sight
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata
from router_service.attention.reference import Decodes, plan_decodes, runs

GATHERED_BYTES = 2**30  # of keys and values that decoding sequences read at once, if one context alone is not longer


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A chunk of one prompt."""

    rows: slice  # its rows among the T tokens
    slots: torch.Tensor  # [S] of the context that any of its tokens sees
    mask: torch.Tensor  # [length, S] bool, true where a token sees a key


Chosen = Seq[torch.Tensor]  # true where a token sees a key: [length, S] of each chunk, [B, 1, 1, S] of decodes
Index = Callable[[tuple[torch.Tensor, ...], torch.Tensor, Any], torch.Tensor]
"""Of rows [B, L, …], what they may see [B, L, S] and keys to be kept: the indices [B, L, most] of what they see."""


class PagedSdpa(AttentionBackend):
    """Gather and softmax, layer by layer as each is."""

    name = "copies of the context, transformers' layers"
    gathers = True

    def __init__(
        self,
        layers: Seq[LayerAttention],
        *,
        num_heads: int,
        has_scores: bool,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        widths = max(layer.kept_width for layer in layers), max(layer.value_width for layer in layers)
        self.layout = PageLayout((block_size, widths[0]), (block_size, widths[1]))
        self.max_gathered_tokens = GATHERED_BYTES // (sum(widths) * dtype.itemsize)
        if has_scores:
            heads = max(num_heads, *(layer.index_heads for layer in layers))
            self.max_gathered_tokens = min(self.max_gathered_tokens, MAX_SCORES // heads)
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
        self,
        layer: int,
        queries: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over copies of what they see; `sinks` [N]. Returns [T, N, W].

        `chosen`: what `choose` returned, for this layer or one before.
        """
        spec = self._backend.layers[layer]
        reads = self._reads[spec.sight]
        all_keys = kv_cache.keys[layer].flatten(0, 1)[:, : spec.key_width]  # [slots, G · H]
        all_values = kv_cache.values[layer].flatten(0, 1)[:, : spec.value_width]
        output = queries.new_empty(*queries.shape[:2], spec.value_dim)
        masks = iter(reads.masks if chosen is None else chosen)
        for prefill in reads.prefills:
            mask = next(masks)
            assert mask is not None, "a chunk has one"
            keys = all_keys.index_select(0, prefill.slots).view(-1, spec.num_kv_heads, spec.key_dim).transpose(0, 1)
            values = all_values.index_select(0, prefill.slots).view(-1, spec.num_kv_heads, spec.value_dim)
            values = values.transpose(0, 1)
            of_chunk = queries[prefill.rows]
            step = max(1, MAX_SCORES // (of_chunk.shape[1] * keys.shape[1]))
            for first in range(0, len(of_chunk), step):
                part = of_chunk[first : first + step]
                attended = _attend(
                    part.transpose(0, 1)[None],  # [1, N, length, H]
                    keys[None],
                    values[None],
                    mask[first : first + step],
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
                next(masks),
                spec.scaling,
                sinks,
            )
            output[decodes.rows] = attended.squeeze(2)
        return output

    def choose(self, layer: int, indexer: Index, per_token: Seq[torch.Tensor], kv_cache: KVCache) -> Chosen:
        """What an indexer lets tokens see of what they could; its keys are kept behind the layer's.

        `per_token`: [1, T, …] each.
        """
        spec = self._backend.layers[layer]
        reads = self._reads[spec.sight]
        kept = kv_cache.keys[layer].flatten(0, 1)[:, spec.key_width : spec.kept_width]  # [slots, index_dim]
        chosen = []
        for prefill in reads.prefills:
            parts = []
            step = max(1, MAX_SCORES // (spec.index_heads * len(prefill.slots)))
            for first in range(0, len(prefill.mask), step):
                mask = prefill.mask[first : first + step]
                rows = slice(prefill.rows.start + first, prefill.rows.start + first + len(mask))
                keys = _IndexKeys(kept, self._write_slots[rows][None], prefill.slots[None])
                parts.append(_seen(indexer(tuple(of[:, rows] for of in per_token), mask[None], keys), mask[None])[0])
            chosen.append(torch.cat(parts))
        for decodes in reads.decodes:
            rows_of = tuple(of[0, decodes.rows][:, None] for of in per_token)  # [B, 1, …]
            mask = decodes.slots.new_ones((len(decodes.slots), 1, decodes.slots.shape[1]), dtype=torch.bool)
            if decodes.mask is not None:
                mask = decodes.mask[:, 0] == 0
            keys = _IndexKeys(kept, self._write_slots[decodes.rows][:, None], decodes.slots)
            chosen.append(_seen(indexer(rows_of, mask, keys), mask)[:, None])
        return chosen


def _seen(indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Those of the keys in a mask [B, L, S] that are among `indices` [B, L, most]."""
    return torch.zeros_like(mask).scatter_(-1, indices.long(), True) & mask


class _IndexKeys:
    """In place of a cache, for an indexer: keeps its keys, and tells those of the context."""

    def __init__(self, kept: torch.Tensor, write_slots: torch.Tensor, slots: torch.Tensor) -> None:
        """`kept` [slots, width]; where each row's key belongs [B, L], and what each sequence reads [B, S]."""
        self._kept, self._write_slots, self._slots = kept, write_slots, slots

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:  # noqa: ARG002
        """`keys` [B, L, width] → those of the context [B, S, width]. Some indexers make theirs in fp32 (dots3_note)."""
        self._kept.index_copy_(0, self._write_slots.flatten(), keys.flatten(0, 1).to(self._kept.dtype))
        return self._kept[self._slots]


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

    @property
    def masks(self) -> list[torch.Tensor | None]:
        """Of all of them, the chunks' first."""
        return [*(prefill.mask for prefill in self.prefills), *(decodes.mask for decodes in self.decodes)]


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
    scores = (grouped @ keys.transpose(2, 3)).mul_(scaling)  # [B, G, N / G · L, S]
    scores = scores.view(*queries.shape[:3], -1)  # [B, N, L, S]
    if mask is not None and mask.dtype is torch.bool:
        scores.masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        scores += mask
    sunk = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat([scores, sunk], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., :-1]
    del scores
    attended = shares.reshape(*grouped.shape[:3], -1) @ values  # [B, G, N / G · L, W]
    return attended.view(*queries.shape[:3], -1)
