"""Puts contexts into an engine's KV cache that nobody computed: random numbers, found later through the prefix cache.

Keys and values of real models are of the order of one after norms and projections, and so are these: attention does
the same work with them. What is generated after them means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from cluster.messages import Request, SamplingParams
from router_service.engine import Engine
from router_service.scheduling.sequence import Sequence

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
        blocks, kv_cache = self._engine.scheduler.block_manager, self._engine.model_runner.kv_cache
        sequence = Sequence(Request("context", tuple(prompt), SamplingParams(max_tokens=1), seed=0))
        num_cached = blocks.take_prefix(sequence)
        num_tokens = (len(prompt) - 1) // blocks.block_size * blocks.block_size  # whole blocks
        if num_cached < num_tokens:
            has_blocks = blocks.grow(sequence, num_tokens)
            assert has_blocks, "the cache was sized for these prompts"
            first = num_cached // blocks.block_size
            table = torch.tensor(sequence.block_table[first:])[:, None]
            slots = (table * blocks.block_size + torch.arange(blocks.block_size)).view(-1)
            decoder = self._engine.model_runner.decoder
            slots = slots.to(decoder.device)
            for layer in range(decoder.architecture.num_layers):
                keys, values = self._numbers(len(slots), SHIFT * (number + layer))
                kv_cache.write(layer, slots, keys, values)
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
