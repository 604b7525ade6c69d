"""Puts an engine together from a checkpoint and a config: reads tensors, sizes the cache. Starts nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cluster.checkpoint.architecture import compute_dtype, coordinator_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.config import EngineConfig
from cluster.errors import ConfigError
from cluster.planning.placement import DeviceShare, kv_dtype
from cluster.telemetry.kernels import ProcessKernels
from experts_service.device import FEW_THREADS, give_back_unused
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.cores import cores
from experts_service.kernels.selection import Selection, select
from experts_service.weights import read_tensors
from router_service.attention.backend import AttentionBackend
from router_service.attention.cache_size import cache_size
from router_service.attention.choice import attention_backend
from router_service.attention.kv_cache import KVCache
from router_service.dispatcher import Dispatcher
from router_service.engine import Engine, Event
from router_service.model.decoder import Decoder
from router_service.model.graphs import can_capture, decode_graphs
from router_service.model.model_runner import ModelRunner
from router_service.model.warm_up import capture, warm_up
from router_service.sampling.sampler import Sampler
from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.scheduler import Batch, Scheduler
from router_service.scheduling.step_cost import StepCost

if TYPE_CHECKING:
    from router_service.model.model_runner import AnyDecoder

logger = logging.getLogger(__name__)


def build_engine(
    checkpoint: Checkpoint,
    config: EngineConfig,
    dispatcher: Dispatcher,
    deliver: Callable[[list[Event]], None],
    *,
    on_bytes: Callable[[int], None] | None = None,
    observe_step: Callable[[float, Batch], object] | None = None,
    on_death: Callable[[], object] | None = None,
    shares: Sequence[DeviceShare] = (DeviceShare(),),
    local_experts: bool = False,
    selection: Selection | None = None,
) -> Engine:
    """An engine, not started yet. Raises CheckpointError, ConfigError, or DoesNotFit when one sequence does not
    fit the cache.

    `shares` says who may be on the same device, `local_experts` that they are in this process, loaded already.
    `selection` is what multiplies, where that has been chosen.
    """
    architecture = checkpoint.architecture
    device, dtype_name = resolve_device(config), compute_dtype(config.dtype, architecture)
    dtype: torch.dtype = getattr(torch, dtype_name)
    kept_in = kv_dtype(config.kv_cache_dtype, dtype_name, device.type)
    # Said aloud in any case: Ray gives a worker that reserves no whole CPU one thread.
    torch.set_num_threads(config.num_threads or (cores() if device.type == "cpu" else min(cores(), FEW_THREADS)))
    selection = selection or select_kernel(config, dtype, device)
    max_model_len = config.max_model_len or architecture.max_position_embeddings
    decoder: AnyDecoder
    if checkpoint.model_impl == "transformers":
        from router_service.model.transformers_backend.assembly import transformers_model  # takes seconds to import

        decoder, attention, architecture = transformers_model(
            checkpoint,
            config,
            dispatcher,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            kernel=selection.kernel,
            on_bytes=on_bytes,
        )
    else:
        weights = read_tensors(
            checkpoint, list(coordinator_tensors(architecture)), dtype=dtype, device=device, on_bytes=on_bytes
        )
        decoder = Decoder(architecture, weights, dispatcher, selection.kernel)
        del weights
        attention = attention_backend(
            architecture,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
            kernel=selection.kernel,
            of_codes=kept_in == "int8",
        )
        warm_up(decoder, attention)
    give_back_unused(device)
    has_graphs = _has_graphs(config, decoder, attention, max_model_len)
    cache = cache_size(
        architecture,
        config,
        dtype_name,
        device,
        shares,
        max_model_len=max_model_len,
        local_experts=local_experts,
        gathers=attention.gathers,
        kv_dtype=kept_in,
        with_graphs=has_graphs,
    )
    logger.info("%s; attention: %s; %s", cache, attention.name, selection)
    eos_token_ids = frozenset(architecture.eos_token_ids)
    scheduler = Scheduler(
        BlockManager(cache.num_blocks, config.block_size, prefix_caching=config.prefix_caching),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        cost=StepCost.of(architecture),
        sliding_window=architecture.sliding_window,
    )
    sampler = Sampler(eos_token_ids)
    sampler.warm_up()
    kv_cache = KVCache(architecture.num_layers, cache.num_blocks, attention.layout, dtype=dtype, device=device)
    graphs = None
    if has_graphs and isinstance(decoder, Decoder):
        graphs = decode_graphs(
            decoder,
            kv_cache,
            attention,
            max_num_seqs=config.max_num_seqs,
            block_size=config.block_size,
            max_model_len=max_model_len,
        )
        capture(graphs, device, cache.graph_bytes)
    return Engine(
        scheduler,
        ModelRunner(
            decoder,
            kv_cache,
            attention,
            block_size=config.block_size,
            num_microbatches=1 if config.microbatches == "auto" else config.microbatches,
            graphs=graphs,
        ),
        sampler,
        deliver,
        max_waiting=config.max_waiting,
        runs_ahead=config.async_scheduling == "on" or (config.async_scheduling == "auto" and device.type == "cuda"),
        observe_step=observe_step,
        on_death=on_death,
    )


def _has_graphs(config: EngineConfig, decoder: AnyDecoder, attention: AttentionBackend, max_model_len: int) -> bool:
    """Raises ConfigError where they are asked for and cannot be."""
    if config.cuda_graphs == "off":
        return False
    possible = (
        isinstance(decoder, Decoder)
        and config.microbatches in ("auto", 1)
        and can_capture(decoder, attention, max_model_len)
    )
    if config.cuda_graphs == "on" and not possible:
        raise ConfigError(
            "engine.cuda_graphs: on needs a GPU, one microbatch, and attention that can be captured; "
            f"here it is: {attention.name}"
        )
    return possible


def select_kernel(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Selection:
    """What multiplies in this process. Raises ConfigError where what is configured does not run here."""
    return select(dtype, device, kernels=config.kernels, batch_invariant=config.batch_invariant)


def process_kernels(engine: Engine, selection: Selection, weights: str = "") -> ProcessKernels:
    """What computes in a coordinator's process; `weights`: what its matrices were rounded to."""
    decoder, attention = engine.model_runner.decoder, engine.model_runner.attention
    return selection.told(
        decoder.dtype,
        decoder.device,
        attention=attention.name,
        sampling="numba" if AVAILABLE and decoder.device.type == "cpu" else "torch",
        batch_invariant=isinstance(decoder, Decoder) and not attention.gathers,
        weights=weights,
    )


def resolve_device(config: EngineConfig) -> torch.device:
    """`auto` is the GPU this process was given, if any."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
