"""Puts contexts into an engine's KV cache that nobody computed: random numbers, found later through the prefix cache.

Keys and values of real models are of the order of one after norms and projections, and so are these: attention does
the same work with them. What is generated after them means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from cluster.messages import Request, SamplingParams
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.engine import Engine
from router_service.scheduling.sequence import Sequence

CHUNK = 1024  # tokens that are written at once
SHIFT = 97  # tokens by which each sequence and layer reads the same random numbers later than the one before


class Contexts:
    """Random keys and values, the same in every run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = torch.empty(0)

    @torch.inference_mode()
    def fill(self, prompts: Seq[Seq[int]]) -> None:
        """Make the cache hold all of the prompts but their last tokens, where it does not yet.

        On a thread that has the engine for itself. The next sequences with these prompts take them from the cache.
        """
        for number, prompt in enumerate(prompts):
            self._fill_one(number, prompt)

    def _fill_one(self, number: int, prompt: Seq[int]) -> None:
        blocks, runner = self._engine.scheduler.block_manager, self._engine.model_runner
        sequence = Sequence(Request("context", tuple(prompt), SamplingParams(max_tokens=1), seed=0))
        num_cached = blocks.take_prefix(sequence)
        num_tokens = (len(prompt) - 1) // blocks.block_size * blocks.block_size  # whole blocks
        if num_cached < num_tokens:
            has_blocks = blocks.grow(sequence, num_tokens)
            assert has_blocks, "the cache was sized for these prompts"
            for start in range(num_cached, num_tokens, CHUNK):
                span = Span(start, min(CHUNK, num_tokens - start), sequence.block_table)
                plan = runner.attention.plan(AttentionMetadata([span], blocks.block_size))
                for layer in range(runner.decoder.architecture.num_layers):
                    keys, values = self._numbers(span.length, SHIFT * (number + layer) + start)
                    plan.write(layer, keys, values, runner.kv_cache)
            sequence.num_computed_tokens = num_tokens
            blocks.publish(sequence)
        blocks.free(sequence)

    def _numbers(self, num_tokens: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_tokens, G, H]."""
        decoder = self._engine.model_runner.decoder
        a = decoder.architecture
        if len(self._random) < 2 * num_tokens:
            generator = torch.Generator().manual_seed(0)
            shape = (2 * num_tokens, a.num_kv_heads, a.head_dim)
            self._random = torch.randn(shape, generator=generator).to(decoder.device, decoder.dtype)
        start = shift % (len(self._random) - num_tokens + 1)
        keys = self._random[start : start + num_tokens]
        return keys, keys.flip(-1)
