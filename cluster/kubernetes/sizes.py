"""How many pods of each role a configuration needs, and how large they are. By cluster.planning.placement's arithmetic.

A pod is one Ray node. With GPUs every shard has a pod with one GPU, and a coordinator too, unless it shares a shard's.
Without, each expert pod can hold all the shards: Ray packs them as it likes, and no CPU is reserved for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoint.architecture import Architecture, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import EMBEDDED, resolve_model
from cluster.checkpoint.known_models import KNOWN_MODELS
from cluster.checkpoint.outline import outline
from cluster.config import MantaConfig, ModelConfig
from cluster.errors import ConfigError, DoesNotFit
from cluster.kubernetes.names import Role
from cluster.planning.gpus import gpu_memory_bytes
from cluster.planning.placement import (
    SERVICE_PROCESS_BYTES,
    TORCH_PROCESS_BYTES,
    ExpertGroup,
    KvDtype,
    Node,
    Room,
    WeightBytes,
    check_fit,
    kv_bytes_per_token,
    kv_dtype,
    plan_groups,
)
from cluster.planning.weights import held_weights

NODE_BYTES = 2**30  # raylet, agents, log monitor, HAProxy and the proxy behind it: 615 MB with Ray 2.60 on Linux
HEAD_BYTES = 5 * 2**29  # and the GCS, the dashboard's processes and Serve's controller
CUDA_PROCESS_BYTES = 4 * 2**30  # host memory of a process with a CUDA context and pinned buffers; not measured
OBJECT_STORE_MIB, SHARED_MEMORY_MIB = 512, 640  # rows of a few prefills, no more lives there


@dataclass(frozen=True, slots=True)
class PodSize:
    """What one pod is given."""

    cpus: int
    memory_mib: int  # shared memory is part of it
    gpus: int = 0

    @property
    def shared_memory_mib(self) -> int:
        """Of /dev/shm."""
        return SHARED_MEMORY_MIB


@dataclass(frozen=True, slots=True)
class PodGroup:
    """Pods of one role."""

    size: PodSize
    min_pods: int
    max_pods: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """One model, as far as sizes go."""

    config: ModelConfig
    checkpoint: Checkpoint  # an outline where its files are not here
    groups: tuple[ExpertGroup, ...]  # none where the coordinator has all experts itself

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @property
    def on_gpu(self) -> bool:
        return self.config.engine.device == "cuda"

    @property
    def shares_gpu(self) -> bool:
        """Whether coordinators are on the shards' GPUs."""
        share = self.config.experts.gpus_per_shard
        return self.on_gpu and bool(self.groups) and share is not None and share < 1

    @property
    def kv_dtype(self) -> KvDtype:
        """What keys and values are kept in. Raises ConfigError for a GPU's in int8."""
        engine = self.config.engine
        return kv_dtype(engine.kv_cache_dtype, compute_dtype(engine.dtype, self.architecture), engine.device)

    @property
    def kv_tokens(self) -> int:
        """That a coordinator's cache has to hold: what is configured, and one sequence of full length at least."""
        engine, a = self.config.engine, self.architecture
        longest = engine.max_model_len or a.max_position_embeddings
        token_bytes = kv_bytes_per_token(a, self.kv_dtype)
        return max(longest, int((engine.kv_cache_gib or 0) * 2**30 / token_bytes))

    @property
    def weight_bytes(self) -> int:
        """Of the checkpoint's files; of one that is not here, as its config says."""
        return sum(ref.nbytes for ref in self.checkpoint.tensors.values())

    @property
    def held(self) -> WeightBytes:
        """What weights take in the memory of processes."""
        dtype = compute_dtype(self.config.engine.dtype, self.architecture)
        return held_weights(self.checkpoint, dtype, "cuda" if self.on_gpu else "cpu")

    def coordinator_host_bytes(self) -> int:
        """Of host memory."""
        process = SERVICE_PROCESS_BYTES + TORCH_PROCESS_BYTES + self.config.engine.grammar_cache_mib * 2**20
        if self.on_gpu:
            return process + CUDA_PROCESS_BYTES
        held = self.held
        weights = held.coordinator + (0 if self.groups else self.architecture.num_experts * held.expert)
        return process + weights + int((self.config.engine.kv_cache_gib or 0) * 2**30)

    def shard_host_bytes(self, group: ExpertGroup) -> int:
        """Of host memory, with the replica that supervises it."""
        process = SERVICE_PROCESS_BYTES + TORCH_PROCESS_BYTES
        if self.on_gpu:
            return process + CUDA_PROCESS_BYTES
        return process + len(group.experts) * self.held.expert


def model_size(model: ModelConfig) -> ModelSize:
    """Raises ConfigError for a model whose sizes cannot be known here."""
    checkpoint = _known(model.path, model.revision).rounded(model.engine.rounding)
    architecture = checkpoint.architecture
    local = architecture.is_dense or model.experts.transport == "local"
    groups = () if local else plan_groups(model.experts.groups, architecture.num_experts, 0, 1)
    return ModelSize(model, checkpoint, groups)


def _known(path: str, revision: str | None) -> Checkpoint:
    """Of a directory, an embedded model, or a hub id that is known. Raises ConfigError for others."""
    if path in KNOWN_MODELS:
        known_model = KNOWN_MODELS[path]
        return outline(path, known_model.architecture, known_model.scheme)
    if path in EMBEDDED or Path(path).expanduser().is_dir():
        return open_checkpoint(resolve_model(path, revision))
    known = ", ".join(KNOWN_MODELS)
    raise ConfigError(f"models: {path!r} is no directory here, and its sizes are not known; known are {known}")


def pod_groups(config: MantaConfig) -> dict[Role, PodGroup]:
    """By role, without roles that have no pod. Raises DoesNotFit where a GPU is too small."""
    settings, models = config.kubernetes, [model_size(model) for model in config.models]
    for model in models:
        _check_gpus(model, settings.gpu_type)
    groups: dict[Role, PodGroup] = {"gateway": _gateways(config)}
    if coordinators := [model for model in models if not model.shares_gpu]:
        lowest = sum(model.config.coordinators.min_replicas for model in coordinators)
        highest = sum(_with_surge(model.config, model.config.coordinators.max_replicas) for model in coordinators)
        largest = max(model.coordinator_host_bytes() for model in coordinators)
        gpus = int(any(model.on_gpu for model in coordinators))
        size = PodSize(settings.coordinator_cpus, _mib(NODE_BYTES + largest), gpus)
        groups["coordinator"] = PodGroup(size, lowest, highest)
    if experts := [model for model in models if model.groups]:
        groups["expert"] = _experts(experts, settings.expert_cpus, settings.cpu_expert_pods)
    return groups


def head_size(cpus: int) -> PodSize:
    """No work is on the head: it is Ray's own."""
    return PodSize(cpus, _mib(HEAD_BYTES))


def _gateways(config: MantaConfig) -> PodGroup:
    gateway = config.gateway
    memory = NODE_BYTES + 2 * SERVICE_PROCESS_BYTES + gateway.max_bytes_received
    size = PodSize(config.kubernetes.gateway_cpus, _mib(memory))
    return PodGroup(size, gateway.replicas.min_replicas, 2 * gateway.replicas.max_replicas)


def _experts(models: list[ModelSize], cpus: int, cpu_pods: int) -> PodGroup:
    shards = [(model, group) for model in models for group in model.groups]
    if not any(model.on_gpu for model in models):
        memory = NODE_BYTES + sum(
            model.shard_host_bytes(group)
            * _with_surge(model.config, model.config.experts.scaling_of(group.index, None).max_replicas)
            for model, group in shards
        )
        return PodGroup(PodSize(cpus, _mib(memory)), cpu_pods, cpu_pods)
    memory = NODE_BYTES + max(
        model.shard_host_bytes(group) + (model.coordinator_host_bytes() if model.shares_gpu else 0)
        for model, group in shards
    )
    scaling = [(model.config, model.config.experts.scaling_of(group.index, None)) for model, group in shards]
    lowest = sum(bounds.min_replicas for _, bounds in scaling)
    highest = sum(_with_surge(model, bounds.max_replicas) for model, bounds in scaling)
    return PodGroup(PodSize(cpus, _mib(memory), 1), lowest, highest)


def _with_surge(model: ModelConfig, replicas: int) -> int:
    """With those that a rolling update, or the drain of a machine, starts before the old ones stop."""
    return replicas + math.ceil(replicas * model.max_surge_percent / 100)


def _check_gpus(model: ModelSize, gpu_type: str | None) -> None:
    """Raises DoesNotFit unless every process of the model fits the GPU of its pod."""
    if not model.on_gpu:
        return
    if model.config.engine.kv_cache_gib is None and model.shares_gpu:
        raise ConfigError("engine.kv_cache_gib: say how much; the coordinator shares its GPU with a shard")
    share = model.config.experts.gpus_per_shard if model.config.experts.gpus_per_shard is not None else 1.0
    memory = gpu_memory_bytes(gpu_type or "")
    num_coordinators = model.config.coordinators.min_replicas
    pods = len(model.groups) + (0 if model.shares_gpu else num_coordinators)
    dtype = compute_dtype(model.config.engine.dtype, model.architecture)
    try:
        check_fit(
            model.architecture,
            dtype,
            model.groups,
            Room([Node(f"pod {index}", 2**50, (memory,)) for index in range(pods)]),
            kv_tokens=model.kv_tokens,
            kv_dtype=model.kv_dtype,
            weights=model.held,
            num_coordinators=num_coordinators,
            gpus_per_shard=share,
            gpus_per_coordinator=1 - share if model.shares_gpu else 1.0,
            local=not model.groups,
        )
    except DoesNotFit as error:
        raise DoesNotFit(f"models: {model.config.name!r} on {gpu_type} GPUs: {error.message}") from error


def _mib(size: int) -> int:
    """With shared memory, rounded up to a quarter of a GiB."""
    return 256 * math.ceil((size / 2**20 + SHARED_MEMORY_MIB) / 256)
