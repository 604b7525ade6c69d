"""Has a GPU's kernels compiled before anybody waits for them: steps of no sequence. Knows a model; sends nothing.

Triton compiles a kernel when it is first started, for seconds, and again for other tiles. What experts elsewhere and
attention start they have had compiled themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts_service.carriers.local import ANSWERED
from experts_service.device import give_back_unused
from experts_service.kernels.gpu.products import few_and_many
from experts_service.transport import Flight, GroupRows
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache
from router_service.model.decoder import Decoder


class _Nobody:
    """A transport to experts that are elsewhere, who are not asked."""

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:  # noqa: ARG002
        return ANSWERED

    def close(self) -> None:
        """Nothing is open."""


class _Nothing(AttentionPlan):
    """Of tokens that see nothing."""

    def write(self, layer: int, keys: Tensor, values: Tensor, kv_cache: KVCache) -> None:
        """They are kept nowhere."""

    def read(self, layer: int, queries: Tensor, kv_cache: KVCache) -> Tensor:  # noqa: ARG002
        return queries.new_zeros(queries.shape)


@torch.inference_mode()
def warm_up(decoder: Decoder, attention: AttentionBackend) -> None:
    """Few rows and many, and those that a CUDA graph pads. No expert's rows are counted."""
    if decoder.device.type != "cuda":
        return
    dispatcher = decoder.dispatcher
    kv_cache = KVCache(0, 0, attention.layout, dtype=decoder.dtype, device=decoder.device)
    padded = torch.zeros(1, dtype=torch.int64, device=decoder.device) if dispatcher.waits_for_nobody else None
    decoder.dispatcher = dispatcher.apart(_Nobody())
    try:
        _, most_of_one = few_and_many(1)
        few, most_of_experts = few_and_many(max(1, decoder.architecture.num_experts))
        many = max(most_of_one, -(-most_of_experts // max(1, decoder.architecture.top_k)))
        for num_rows in (few, many):
            for num_real in (None, padded):
                zeros = torch.zeros(num_rows, dtype=torch.int64, device=decoder.device)
                layers = decoder.forward(zeros, zeros, _Nothing(), kv_cache, num_real=num_real)
                while True:
                    try:
                        next(layers)
                    except StopIteration as finished:
                        decoder.logits(decoder.hidden_states(finished.value[:most_of_one]))
                        break
    finally:
        decoder.dispatcher = dispatcher
    give_back_unused(decoder.device)
