"""Puts an engine together from a checkpoint and a config: reads tensors, sizes the cache. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import torch

from cluster.architecture import compute_dtype, coordinator_tensors
from cluster.checkpoint import Checkpoint
from cluster.config import EngineConfig
from cluster.errors import DoesNotFit
from cluster.placement import kv_bytes_per_token
from experts_service.weights import read_tensors
from router_service.block_manager import BlockManager
from router_service.decoder import Decoder
from router_service.dispatcher import Dispatcher
from router_service.engine import Engine, Event
from router_service.kv_cache import KVCache
from router_service.model_runner import ModelRunner
from router_service.sampler import Sampler
from router_service.scheduler import Batch, Scheduler

_CPU_CACHE_FRACTION = 0.2  # of the memory that is free at start: experts and other processes share the rest
_GPU_CACHE_FRACTION = 0.9  # of what the weights leave free; the rest is for activations


def build_engine(
    checkpoint: Checkpoint,
    config: EngineConfig,
    dispatcher: Dispatcher,
    deliver: Callable[[list[Event]], None],
    *,
    on_bytes: Callable[[int], None] | None = None,
    observe_step: Callable[[float, Batch], object] | None = None,
    on_death: Callable[[], object] | None = None,
) -> Engine:
    """An engine, not started yet. Raises CheckpointError, or DoesNotFit when the cache cannot hold one sequence."""
    architecture = checkpoint.architecture
    device, dtype_name = resolve_device(config), compute_dtype(config.dtype, architecture)
    dtype: torch.dtype = getattr(torch, dtype_name)
    # Said aloud in any case: Ray gives a worker that reserves no whole CPU one thread.
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    weights = read_tensors(
        checkpoint, list(coordinator_tensors(architecture)), dtype=dtype, device=device, on_bytes=on_bytes
    )
    decoder = Decoder(architecture, weights, dispatcher)
    max_model_len = config.max_model_len or architecture.max_position_embeddings
    num_blocks = _num_blocks(config, kv_bytes_per_token(architecture, dtype_name), device, max_model_len)
    eos_token_ids = frozenset(architecture.eos_token_ids)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size, prefix_caching=config.prefix_caching),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
    )
    kv_cache = KVCache(architecture, num_blocks, config.block_size, dtype=dtype, device=device)
    return Engine(
        scheduler,
        ModelRunner(decoder, kv_cache, 1 if config.microbatches == "auto" else config.microbatches),
        Sampler(eos_token_ids),
        deliver,
        max_waiting=config.max_waiting,
        observe_step=observe_step,
        on_death=on_death,
    )


def resolve_device(config: EngineConfig) -> torch.device:
    """`auto` is the GPU this process was given, if any."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _num_blocks(config: EngineConfig, token_bytes: int, device: torch.device, max_model_len: int) -> int:
    """As many blocks as the config says, or as the free memory holds, and never more than can be used at once."""
    block_bytes = config.block_size * token_bytes
    blocks_of_one = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    else:
        if config.kv_cache_gib is not None:
            budget = int(config.kv_cache_gib * 2**30)
        elif device.type == "cuda":
            budget = int(_GPU_CACHE_FRACTION * torch.cuda.mem_get_info(device)[0])
        else:
            budget = int(_CPU_CACHE_FRACTION * psutil.virtual_memory().available)
        num_blocks = min(budget // block_bytes, config.max_num_seqs * blocks_of_one)
    if num_blocks < blocks_of_one:
        raise DoesNotFit(
            f"the KV cache has {num_blocks} blocks of {config.block_size} tokens, but one sequence of max_model_len "
            f"{max_model_len} needs {blocks_of_one} ({blocks_of_one * block_bytes / 2**30:.2f} GiB); "
            "raise engine.kv_cache_gib or engine.num_kv_blocks, or lower engine.max_model_len"
        )
    return num_blocks
