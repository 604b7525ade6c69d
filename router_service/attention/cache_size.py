"""How many blocks the KV cache gets: what weights, steps and neighbours leave of the device. Allocates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from cluster.checkpoint.architecture import Architecture
from cluster.config import EngineConfig
from cluster.errors import DoesNotFit
from cluster.planning.placement import DeviceShare, Dtype, KvDtype, gib, kv_bytes_per_token
from cluster.planning.step_memory import graph_bytes, step_bytes

_CPU_FRACTION = 0.2  # of the memory that is free at start: experts and other processes share the rest
_GPU_FRACTION = 0.9  # of a card's memory; the rest is for CUDA itself and the allocator's gaps


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The cache, and what fits into it. As text, one line for the log."""

    num_blocks: int
    block_size: int
    block_bytes: int
    step_bytes: int  # kept free for steps, captured ones included; more than that is never allocated by one
    graph_bytes: int  # of these for captured ones
    max_num_seqs: int
    max_model_len: int

    def __str__(self) -> str:
        tokens = self.num_blocks * self.block_size
        each = min(tokens // self.max_num_seqs, self.max_model_len)
        return (
            f"KV cache of {gib(self.num_blocks * self.block_bytes)}, {tokens} tokens: {self.max_num_seqs} sequences "
            f"(max_num_seqs) of {each} tokens each, or {tokens // self.max_model_len} of {self.max_model_len} "
            f"(max_model_len); a step takes up to {gib(self.step_bytes)} beside it"
        )


def cache_size(
    architecture: Architecture,
    config: EngineConfig,
    dtype: Dtype,
    device: torch.device,
    shares: Sequence[DeviceShare],
    *,
    max_model_len: int,
    local_experts: bool,
    gathers: bool,
    kv_dtype: KvDtype | None = None,
    with_graphs: bool = False,
) -> CacheSize:
    """As many blocks as the config says, or as the device has room for, and never more than can be used at once.

    Weights are on the device already. `shares`: who else may be there, in every way that may come about. `gathers`:
    attention copies what it reads. `kv_dtype`: what the cache is kept in; None: `dtype`. `with_graphs`: steps that only
    decode are captured, in memory that no other step uses.

    Raises DoesNotFit when not even one sequence fits.
    """
    block_bytes = config.block_size * kv_bytes_per_token(architecture, kv_dtype or dtype)
    blocks_of_one = -(-max_model_len // config.block_size)
    of_steps = step_bytes(
        architecture,
        dtype,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        local_experts=local_experts,
        gathers=gathers,
        kv_dtype=kv_dtype,
    )
    of_graphs = 0
    if with_graphs:
        of_graphs = graph_bytes(
            architecture,
            dtype,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            local_experts=local_experts,
        )
        of_steps += of_graphs
    left_by = f"what is configured leaves {gib(of_steps)} for steps"
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    else:
        if config.kv_cache_gib is not None:
            budget = int(config.kv_cache_gib * 2**30)
        else:
            room = min(_room(device, share) for share in shares)
            budget = room - of_steps
            left_by = f"of {gib(room)} beside the weights a step may take {gib(of_steps)}"
        num_blocks = max(0, min(budget // block_bytes, config.max_num_seqs * blocks_of_one))
    if num_blocks < blocks_of_one:
        raise DoesNotFit(
            f"the KV cache has {num_blocks} blocks of {config.block_size} tokens, but one sequence of max_model_len "
            f"{max_model_len} needs {blocks_of_one} ({gib(blocks_of_one * block_bytes)}; {left_by}); "
            "raise engine.kv_cache_gib or engine.num_kv_blocks, or lower engine.max_model_len"
        )
    return CacheSize(
        num_blocks, config.block_size, block_bytes, of_steps, of_graphs, config.max_num_seqs, max_model_len
    )


def _room(device: torch.device, share: DeviceShare) -> int:
    """What a coordinator may use beside its weights. Of a card it counts on what there is, not on what is free now."""
    if device.type == "cuda":
        usable = int(_GPU_FRACTION * torch.cuda.get_device_properties(device).total_memory)
        return (usable - share.neighbour_bytes) // share.coordinators - torch.cuda.memory_allocated(device)
    return int(_CPU_FRACTION * psutil.virtual_memory().available) // share.coordinators
