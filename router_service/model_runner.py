"""Turns a scheduled batch into tensors, runs the decoder over it, and hands back logits. Chooses nothing.

Shapes: T tokens of the step, B sequences that get a new token, V vocabulary.
"""

from __future__ import annotations

import torch

from router_service.attention import AttentionPlan, Span
from router_service.decoder import Decoder
from router_service.kv_cache import KVCache
from router_service.scheduler import Batch


class ModelRunner:
    """One decoder and its KV cache."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [B, V] in fp32, one row per scheduled sequence with `samples`, in order.

        Raises ExpertUnavailable when the experts cannot be reached in time; the cache may then hold half a step, which
        does not matter: the same slots are written again.
        """
        device = self.decoder.device
        token_ids: list[int] = []
        positions: list[int] = []
        sampled_rows: list[int] = []
        spans: list[Span] = []
        for scheduled in batch:
            end = scheduled.start + scheduled.num_tokens
            token_ids += scheduled.sequence.token_ids[scheduled.start : end]
            positions += range(scheduled.start, end)
            spans.append(Span(scheduled.start, scheduled.num_tokens, self._slots(scheduled.sequence.block_table, end)))
            if scheduled.samples:
                sampled_rows.append(len(token_ids) - 1)
        plan = AttentionPlan(
            spans,
            sliding_window=self.decoder.architecture.sliding_window,
            dtype=self.decoder.dtype,
            device=device,
        )
        forward = self.decoder.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            plan,
            self.kv_cache,
            torch.tensor(sampled_rows, dtype=torch.int64, device=device),
        )
        while True:
            try:
                next(forward)
            except StopIteration as finished:
                logits: torch.Tensor = finished.value
                return logits

    def _slots(self, block_table: list[int], num_tokens: int) -> torch.Tensor:
        """Cache slots [num_tokens] of a sequence's first tokens."""
        block_size = self.kv_cache.block_size
        blocks = torch.tensor(block_table[: -(-num_tokens // block_size)])[:, None]
        return (blocks * block_size + torch.arange(block_size)).view(-1)[:num_tokens]
