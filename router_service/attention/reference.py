"""Attention by gathering what a step reads and torch's SDPA over the copies: the reference, and what serves anywhere.

Sequences that decode (one new token each) are padded to the longest and run as one batch, or as several where that
would take too much memory; chunks of prompts run one by one. A page is [slot, G, H], so slot s of block b is row
b · block_size + s of a layer. Padding reads the null block, which is zero: masked values are read as well, and 0 · NaN
would not be 0.

In 8 bits a slot is [G, H + 4] bytes: codes, and the float32 that they are times. Copies are made numbers.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim, B decoding sequences, S longest context.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cluster.checkpoint.architecture import Architecture
from cluster.planning.step_memory import max_gathered_tokens
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import IN_8_BITS, KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata

LARGEST_CODE = 127
LEAST = 2.0**-100  # of a head's largest number: below it all are zero
SCALE_BYTES = torch.float32.itemsize


class ReferenceAttention(AttentionBackend):
    """Gather and SDPA."""

    gathers = True

    def __init__(
        self,
        architecture: Architecture,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        most_gathered: int | None = None,
        of_codes: bool = False,
    ) -> None:
        """`most_gathered`: tokens of decoding sequences, padding included, that are read at once; None: what the
        memory kept for steps allows. `of_codes`: keys and values are kept in 8 bits.
        """
        self.name = "copies of the context, SDPA" + (IN_8_BITS if of_codes else "")
        slot = architecture.head_dim + (torch.float32.itemsize if of_codes else 0)
        page = (block_size, architecture.num_kv_heads, slot)
        self.layout = PageLayout(page, page, torch.int8 if of_codes else None)
        self.of_codes = of_codes
        self.sliding_window = architecture.sliding_window
        self.max_gathered_tokens = most_gathered or max_gathered_tokens(architecture, dtype.itemsize)
        self.dtype = dtype
        self.device = device

    def plan(self, metadata: AttentionMetadata) -> ReferencePlan:
        """Slots and masks of the step."""
        return ReferencePlan(metadata, self)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences with one new token, as one batch."""

    rows: torch.Tensor  # [B] their rows among the T tokens
    slots: torch.Tensor  # [B, S] of their context, padded with slot 0, which is in the null block
    mask: torch.Tensor | None  # [B, 1, 1, S] added to the scores; None when nothing is padded


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A chunk of one prompt."""

    rows: slice  # its rows among the T tokens
    slots: torch.Tensor  # [S] of the context that any of its tokens sees
    mask: torch.Tensor | None  # [length, S] bool, true where a token sees a key; None: plain causal from position 0


class ReferencePlan(AttentionPlan):
    """How the tokens of one step attend."""

    def __init__(self, metadata: AttentionMetadata, backend: ReferenceAttention) -> None:
        window, device = backend.sliding_window, backend.device
        self._of_codes = backend.of_codes
        self._write_slots = torch.from_numpy(metadata.write_slots).to(device)  # [T]
        self._prefills: list[_Prefill] = []
        rows: list[int] = []
        of_decodes: list[torch.Tensor] = []  # slots
        bounds = metadata.query_starts.tolist()
        for index, (first, end, context) in enumerate(
            zip(bounds, bounds[1:], metadata.context_lengths.tolist(), strict=False)
        ):
            # The first key that the first of these tokens sees; earlier ones are not even read.
            begin = max(0, context - (end - first) + 1 - window) if window else 0
            slots = torch.from_numpy(metadata.slots(np.int64(index), np.arange(begin, context)))
            if end - first == 1:
                rows.append(first)
                of_decodes.append(slots)
            else:
                mask = _prefill_mask(end - first, begin, context, window, device)
                self._prefills.append(_Prefill(slice(first, end), slots.to(device), mask))
        self._decodes = [
            plan_decodes(rows[run], of_decodes[run], backend.dtype, device)
            for run in runs([len(slots) for slots in of_decodes], backend.max_gathered_tokens)
        ]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""
        if self._of_codes:
            keys, values = _coded(keys), _coded(values)
        kv_cache.keys[layer].flatten(0, 1).index_copy_(0, self._write_slots, keys)
        kv_cache.values[layer].flatten(0, 1).index_copy_(0, self._write_slots, values)

    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over copies of what they see. Returns [T, N, H]."""
        all_keys, all_values = kv_cache.keys[layer].flatten(0, 1), kv_cache.values[layer].flatten(0, 1)  # [slots, G, H]
        if len(self._decodes) == 1 and not self._prefills:
            return _attend_decodes(self._decodes[0], queries, all_keys, all_values)
        output = torch.empty_like(queries)
        for prefill in self._prefills:
            output[prefill.rows] = _attend_prefill(prefill, queries[prefill.rows], all_keys, all_values)
        for decodes in self._decodes:
            output[decodes.rows] = _attend_decodes(decodes, queries[decodes.rows], all_keys, all_values)
        return output


def _attend_prefill(
    prefill: _Prefill, queries: torch.Tensor, all_keys: torch.Tensor, all_values: torch.Tensor
) -> torch.Tensor:
    """Attention of a chunk's tokens `queries` [length, N, H]. Returns the same shape."""
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],  # [1, N, length, H]
        _gathered(all_keys, prefill.slots, queries.dtype).transpose(0, 1)[None],  # [1, G, S, H]
        _gathered(all_values, prefill.slots, queries.dtype).transpose(0, 1)[None],
        attn_mask=prefill.mask,
        is_causal=prefill.mask is None,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _attend_decodes(
    decodes: Decodes, queries: torch.Tensor, all_keys: torch.Tensor, all_values: torch.Tensor
) -> torch.Tensor:
    """Attention of the last tokens `queries` [B, N, H] over their contexts. Returns [B, N, H]."""
    batch, context = decodes.slots.shape
    groups, head_dim = all_keys.shape[1], queries.shape[2]
    keys, values = (
        _gathered(memory, decodes.slots.view(-1), queries.dtype).view(batch, context, groups, head_dim)
        for memory in (all_keys, all_values)
    )
    # The N / G query heads that share a key head stand where query positions would: no key is repeated.
    grouped = queries.reshape(batch, groups, -1, head_dim)  # [B, G, N / G, H]
    attended = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=decodes.mask
    )
    return attended.reshape(batch, -1, head_dim)


def _gathered(memory: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of these slots [slots, G, H] of a layer's keys or values, as numbers."""
    copied = memory.index_select(0, slots)
    if copied.dtype != torch.int8:
        return copied
    codes, scales = copied[..., :-SCALE_BYTES], copied[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes * scales).to(dtype)


def _coded(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [T, G, H] as codes and scales [T, G, H + 4], the same to the bit as the kernels'."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)  # NaN where a number is
    is_any = largest > LEAST
    inverse = torch.full_like(largest, LARGEST_CODE) / largest  # a number over a tensor is rounded twice
    products = wide.double() * inverse.double()  # exact, so that they are rounded once
    codes = torch.where(is_any & largest.isfinite(), products.round(), 0).to(torch.int8)
    scales = torch.where(is_any | largest.isnan(), largest / LARGEST_CODE, 0)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return torch.cat([codes, scales.view(torch.int8)], dim=-1)


def runs(lengths: Seq[int], max_padded: int) -> list[slice]:
    """Consecutive sequences that are padded to the longest of them, of at most `max_padded` tokens or one sequence."""
    found: list[slice] = []
    first = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and longest * (index + 1 - first) > max_padded:
            found.append(slice(first, index))
            first, longest = index, length
    return [*found, slice(first, len(lengths))] if lengths else []


def plan_decodes(rows: list[int], slots: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> Decodes:
    """Of sequences that are in these rows, and what they read."""
    padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)  # [B, S]
    lengths = torch.tensor([len(s) for s in slots])
    mask = None
    if int(lengths.min()) != padded.shape[1]:
        hidden = torch.arange(padded.shape[1])[None] >= lengths[:, None]  # [B, S]
        mask = torch.zeros(padded.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None].to(device)
    return Decodes(torch.tensor(rows, device=device), padded.to(device), mask)


def _prefill_mask(length: int, begin: int, end: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Of the keys begin … end - 1, which each of the last `length` tokens sees [length, S]; None: all before it."""
    if end == length and (window is None or end <= window):
        return None
    positions = torch.arange(end - length, end, device=device)[:, None]
    keys = torch.arange(begin, end, device=device)[None]
    mask = keys <= positions
    if window:
        mask &= keys > positions - window
    return mask
