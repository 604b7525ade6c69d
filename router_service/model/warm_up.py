"""Has a GPU's kernels compiled and its steps captured before anybody waits for that. Knows a model; sends nothing.

Triton compiles a kernel when it is first started, for seconds, and again for other tiles. What experts elsewhere and
attention start they have had compiled themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.planning.placement import gib
from experts_service.carriers.local import ANSWERED
from experts_service.device import give_back_unused
from experts_service.kernels.gpu.products import few_and_many
from experts_service.transport import Flight, GroupRows
from router_service.attention.backend import AttentionBackend, AttentionPlan
from router_service.attention.kv_cache import KVCache
from router_service.model.decoder import Decoder
from router_service.model.graphs import DecodeGraphs

logger = logging.getLogger(__name__)


class _Nobody:
    """A transport to experts that are elsewhere, who are not asked."""

    takes_device_rows = False

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
    padded = torch.zeros(1, dtype=torch.int64, device=decoder.device) if dispatcher.can_be_captured else None
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


def capture(graphs: DecodeGraphs, device: torch.device, planned_bytes: int) -> None:
    """All of them, in memory that was kept free beside the KV cache, which is there."""
    began, (free, _) = time.monotonic(), torch.cuda.mem_get_info(device)
    graphs.capture()
    taken = max(0, free - torch.cuda.mem_get_info(device)[0])
    logger.info(
        "steps that only decode are CUDA graphs, of %d batch sizes, captured in %.1f s; they take %s of the %s that "
        "were kept free for them",
        graphs.num_captured,
        time.monotonic() - began,
        gib(taken),
        gib(planned_bytes),
    )
    if taken > planned_bytes:
        logger.warning("lower engine.max_num_seqs, or set engine.cuda_graphs: off, if memory gets short")
