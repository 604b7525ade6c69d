"""Puts a model of transformers together with its attention, and says how wide its cache is. Starts nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.config import EngineConfig
from cluster.errors import ConfigError
from experts_service.kernels.kernel import Kernel
from experts_service.transformers_backend.layer_attention import with_cache_of
from router_service.attention.backend import AttentionBackend
from router_service.dispatcher import Dispatcher
from router_service.model.transformers_backend.attention import PagedSdpa
from router_service.model.transformers_backend.decoder import TransformersDecoder
from router_service.model.transformers_backend.pages import paged_layers

logger = logging.getLogger(__name__)


def transformers_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    dispatcher: Dispatcher,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    kernel: Kernel,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[TransformersDecoder, AttentionBackend, Architecture]:
    """Loaded; and the architecture with the sizes of the cache as the model's own layers have them.

    Raises CheckpointError, or ConfigError for what only models of ours can do.
    """
    if config.kv_cache_dtype != "auto":
        raise ConfigError(f"engine.kv_cache_dtype: {config.kv_cache_dtype} is for native models; this one needs auto")
    if checkpoint.widened:
        logger.info("%s", checkpoint.widening(str(dtype).removeprefix("torch.")))
    decoder = TransformersDecoder(
        checkpoint,
        dispatcher,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        kernel=kernel,
        on_bytes=on_bytes,
    )
    architecture = with_cache_of(checkpoint.architecture, decoder.attention)
    in_place = paged_layers(
        decoder.attention, architecture, block_size=config.block_size, dtype=dtype, device=device, kernel=kernel
    )
    attention = in_place or PagedSdpa(
        decoder.attention,
        num_heads=architecture.num_heads,
        has_scores=architecture.has_scores,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
    )
    return decoder, attention, architecture
