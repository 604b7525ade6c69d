"""What an engine is configured with to be measured: groups of experts, a KV cache for the largest workload.

Raises ConfigError or DoesNotFit for whatever a user can mend. Loads nothing, runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import psutil
import torch
from pydantic import ValidationError

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.shapes import num_parameters
from cluster.config import EngineConfig, ExpertsConfig, ModelConfig
from cluster.errors import ConfigError, DoesNotFit
from cluster.planning.placement import DTYPE_BYTES, Dtype, ExpertGroup, KvDtype, gib, kv_bytes_per_token, plan_groups

BLOCK_SIZE = EngineConfig().block_size
DEFAULT_GROUPS = 4


def prefills_named(names: Iterable[str]) -> tuple[Workload, ...]:
    """`16x64`: 16 prompts of 64 tokens, one token generated after each."""
    workloads = []
    for name in names:
        sequences, _, tokens = name.partition("x")
        if not (sequences.isdecimal() and tokens.isdecimal() and int(sequences) and int(tokens)):
            raise ConfigError(f"--prefill {name}: write 16x64 for 16 prompts of 64 tokens")
        workloads.append(Workload(int(sequences), int(tokens), 1))
    return tuple(workloads)


def even_groups(architecture: Architecture, transport: str, number: int | None) -> tuple[ExpertGroup, ...]:
    """Neighbouring experts together, sizes as even as can be."""
    num_experts = architecture.num_experts
    if architecture.is_dense:
        return ()
    number = number or (1 if transport == "local" else min(DEFAULT_GROUPS, num_experts))
    if number > num_experts:
        raise ConfigError(f"--groups {number}: the model has {num_experts} experts")
    bounds = [num_experts * i // number for i in range(number + 1)]
    setting = [range(bounds[i], bounds[i + 1]) for i in range(number)]
    return plan_groups(setting, num_experts, 0, 0)


def config_for(
    checkpoint: Checkpoint,
    groups: Sequence[ExpertGroup],
    workloads: Sequence[Workload],
    *,
    transport: str = "local",
    dtype: str = "auto",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
) -> ModelConfig:
    """What `manta serve` would be configured with, and a cache for the largest workload."""
    longest = max(w.num_tokens for w in workloads)
    context = checkpoint.architecture.max_position_embeddings
    if longest > context:
        raise ConfigError(f"prompt and output are {longest} tokens, and the model's context is {context}")
    blocks = max(w.num_sequences * _blocks_of(w) for w in workloads)
    most = max(w.num_sequences for w in workloads)
    try:
        engine = EngineConfig.model_validate(
            {
                "dtype": dtype,
                "quantization": quantization,
                "kv_cache_dtype": kv_cache_dtype,
                "max_model_len": longest,
                "block_size": BLOCK_SIZE,
                "num_kv_blocks": blocks + 1,  # and one for the request that holds the others back
                "max_num_seqs": max(most, EngineConfig().max_num_seqs),
                "max_waiting": max(most, EngineConfig().max_waiting),
                # Every run has the same prompts: they are to be found if they were put there, else to be computed.
                "prefix_caching": any(w.context for w in workloads),
            }
        )
        experts = ExpertsConfig.model_validate(
            {
                "groups": tuple(group.experts for group in groups),
                "transport": "auto" if transport == "host" else transport,
                "rows_on_gpus": transport != "host",
                "gpus_per_shard": None if transport == "local" else _gpus_per_shard(len(groups)),
            }
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return ModelConfig(
        name="bench",
        path=str(checkpoint.directory),
        model_impl=checkpoint.model_impl,
        engine=engine,
        experts=experts,
    )


def _gpus_per_shard(num_groups: int) -> float | None:
    """Where there are too few for each to have one: what lets all of them, and this process, share those there are."""
    num_gpus = torch.cuda.device_count()
    if not 0 < num_gpus <= num_groups:
        return None
    return 900 // -(-num_groups // num_gpus) / 1000  # rounded up, seven of them left a coordinator too little


def check_memory(
    architecture: Architecture,
    dtype: Dtype,
    device: torch.device,
    workloads: Iterable[Workload],
    engines: int = 1,
    kv_dtype: KvDtype | None = None,
) -> None:
    """Raises DoesNotFit where each engine's weights and KV cache of a workload are more than the device has free."""
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    room = free // engines - num_parameters(architecture) * DTYPE_BYTES[dtype]
    bytes_of_token = kv_bytes_per_token(architecture, kv_dtype or dtype)
    for workload in workloads:
        bytes_of_sequence = workload.num_tokens * bytes_of_token
        needed = workload.num_sequences * bytes_of_sequence
        if needed <= room:
            continue
        fit = room // bytes_of_sequence
        would = f"{fit} such sequences" if fit > 0 else f"one sequence of {max(0, room // bytes_of_token)} tokens"
        raise DoesNotFit(
            f"{workload.num_sequences} sequences of {workload.num_tokens} tokens need {gib(needed)} of KV cache, and "
            f"beside the weights {gib(max(0, room))} are free: {would} would fit"
        )


def _blocks_of(workload: Workload) -> int:
    """KV blocks for each sequence: its tokens, and what has to be free for it to grow so that all begin in one step."""
    tokens = -(-workload.num_tokens // BLOCK_SIZE)
    return tokens + max(1, workload.prompt_tokens // (8 * BLOCK_SIZE))
