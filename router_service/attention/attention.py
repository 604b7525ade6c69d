"""Causal attention over the paged KV cache. Knows where each sequence's tokens lie; knows nothing of weights or layers.

A step mixes two kinds of sequences: those that decode (one new token each), which are padded to the longest and run as
one batch, or as several where that would take too much memory, and chunks of prompts, which run one by one. The plan of
a step is made once and used by every layer.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim, B decoding sequences, S longest context.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from router_service.attention.kv_cache import KVCache

ATTENTION_KERNEL = "copies of the context, SDPA"  # as benchmarks call it


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one new token, as one batch."""

    rows: torch.Tensor  # [B] their rows among the T tokens
    slots: torch.Tensor  # [B, S] of their context, padded with slot 0, which is in the null block
    mask: torch.Tensor | None  # [B, 1, 1, S] added to the scores; None when nothing is padded


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A chunk of one prompt."""

    first: int  # its rows among the T tokens are first … first + length - 1
    length: int
    slots: torch.Tensor  # [S] of the context that any of its tokens sees
    mask: torch.Tensor | None  # [length, S] bool, true where a token sees a key; None: plain causal from position 0


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: positions start … start + length - 1, and the slots of its whole context."""

    start: int
    length: int
    slots: torch.Tensor  # [start + length]


class AttentionPlan:
    """How the tokens of one step attend; made once a step, used by every layer."""

    def __init__(
        self,
        spans: Seq[Span],
        *,
        sliding_window: int | None,
        max_gathered_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`max_gathered_tokens`: of the contexts of decoding sequences, padding included, that are read at once."""
        self.write_slots = torch.cat([span.slots[span.start :] for span in spans]).to(device)  # [T]
        self._prefills: list[_Prefill] = []
        decode_rows: list[int] = []
        decode_slots: list[torch.Tensor] = []
        row = 0
        for span in spans:
            if span.length == 1:
                decode_rows.append(row)
                decode_slots.append(span.slots[-sliding_window:] if sliding_window else span.slots)
            else:
                self._prefills.append(_plan_prefill(span, row, sliding_window, device))
            row += span.length
        self._decodes = [
            _plan_decodes(decode_rows[run], decode_slots[run], dtype, device)
            for run in _runs([len(slots) for slots in decode_slots], max_gathered_tokens)
        ]

    def attend(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""
        if len(self._decodes) == 1 and not self._prefills:
            return _attend_decodes(self._decodes[0], layer, queries, kv_cache)
        output = torch.empty_like(queries)
        for prefill in self._prefills:
            rows = slice(prefill.first, prefill.first + prefill.length)
            keys, values = kv_cache.read(layer, prefill.slots)  # [S, G, H]
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],  # [1, N, length, H]
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=prefill.mask,
                is_causal=prefill.mask is None,
                enable_gqa=True,
            )
            output[rows] = attended[0].transpose(0, 1)
        for decodes in self._decodes:
            output[decodes.rows] = _attend_decodes(decodes, layer, queries[decodes.rows], kv_cache)
        return output


def _attend_decodes(decodes: _Decodes, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
    """Attention of the last tokens `queries` [B, N, H] over their contexts. Returns [B, N, H]."""
    keys, values = kv_cache.read(layer, decodes.slots)  # [B, S, G, H]
    batch, _, groups, head_dim = keys.shape
    # The N / G query heads that share a key head stand where query positions would: no key is repeated.
    grouped = queries.reshape(batch, groups, -1, head_dim)  # [B, G, N / G, H]
    attended = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=decodes.mask
    )
    return attended.reshape(batch, -1, head_dim)


def _runs(lengths: Seq[int], max_padded: int) -> list[slice]:
    """Consecutive sequences that are padded to the longest of them, of at most `max_padded` tokens or one sequence."""
    runs: list[slice] = []
    first = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and longest * (index + 1 - first) > max_padded:
            runs.append(slice(first, index))
            first, longest = index, length
    return [*runs, slice(first, len(lengths))] if lengths else []


def _plan_decodes(rows: list[int], slots: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> _Decodes:
    padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)  # [B, S]
    lengths = torch.tensor([len(s) for s in slots])
    mask = None
    if int(lengths.min()) != padded.shape[1]:
        hidden = torch.arange(padded.shape[1])[None] >= lengths[:, None]  # [B, S]
        mask = torch.zeros(padded.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None].to(device)
    return _Decodes(torch.tensor(rows, device=device), padded.to(device), mask)


def _plan_prefill(span: Span, first: int, sliding_window: int | None, device: torch.device) -> _Prefill:
    # The first key that the first of these tokens sees; earlier ones are not even read.
    begin = max(0, span.start - sliding_window + 1) if sliding_window else 0
    slots = span.slots[begin:].to(device)
    end = span.start + span.length
    if span.start == 0 and (sliding_window is None or end <= sliding_window):
        return _Prefill(first, span.length, slots, None)
    positions = torch.arange(span.start, end, device=device)[:, None]
    keys = torch.arange(begin, end, device=device)[None]
    mask = keys <= positions
    if sliding_window:
        mask &= keys > positions - sliding_window
    return _Prefill(first, span.length, slots, mask)
