"""How many pods of each role a configuration needs, and how large they are. By cluster.planning.placement's arithmetic.

A pod is one Ray node. With GPUs every shard has a pod with one GPU, and a coordinator too, unless it shares a shard's.
Without, each expert pod can hold all the shards: Ray packs them as it likes, and no CPU is reserved for them. Where a
model has tiers there are both kinds of pods for experts, and as many kinds as there are labels that tiers ask for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.checkpoint.architecture import Architecture, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import EMBEDDED, is_directory, resolve_model
from cluster.checkpoint.known_models import KNOWN_MODELS
from cluster.checkpoint.outline import outline
from cluster.config import KubernetesConfig, MantaConfig, ModelConfig, ScalingConfig
from cluster.deploy.app import named_deployments
from cluster.errors import ConfigError, DoesNotFit
from cluster.kubernetes.names import ROLE, TIER, Role
from cluster.planning.gpus import gpu_memory_bytes
from cluster.planning.placement import (
    SERVICE_PROCESS_BYTES,
    TORCH_PROCESS_BYTES,
    ExpertGroup,
    KvDtype,
    Node,
    Room,
    ShardPlace,
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
GATEWAYS_PER_POD = 2  # so that a roll starts its second beside the first, in no pod of its own
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
    """Pods that are alike."""

    role: Role
    size: PodSize
    min_pods: int
    max_pods: int
    tier_labels: Mapping[str, str] = field(default_factory=dict)  # beside the role's

    @property
    def labels(self) -> dict[str, str]:
        """Of the pods, and of the Ray nodes in them."""
        return {ROLE: self.role, **self.tier_labels}


@dataclass(frozen=True, slots=True)
class ShardSize:
    """A group of one model on one tier."""

    group: ExpertGroup
    on_gpu: bool
    gpus: float  # of each replica
    labels: Mapping[str, str]  # that its tier asks for
    expert_bytes: int  # of one expert, as the device holds it
    scaling: ScalingConfig

    @property
    def host_bytes(self) -> int:
        """Of host memory, with the replica that supervises it."""
        process = SERVICE_PROCESS_BYTES + TORCH_PROCESS_BYTES
        return process + (CUDA_PROCESS_BYTES if self.on_gpu else len(self.group.experts) * self.expert_bytes)


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
        return self.on_gpu and any(0 < shard.gpus < 1 for shard in self.shards)

    @property
    def shards(self) -> tuple[ShardSize, ...]:
        """Of all groups, on each of their tiers."""
        experts, on_gpu = self.config.experts, self.on_gpu
        dtype = compute_dtype(self.config.engine.dtype, self.architecture)
        whole = 1.0 if experts.gpus_per_shard is None else experts.gpus_per_shard
        found, held = [], {}
        for _, index, tier, _ in named_deployments(experts, len(self.groups)):
            device = tier.device if tier is not None else "cuda" if on_gpu else "cpu"
            rounding = self.config.rounding_of(tier)
            if (rounding, device) not in held:
                held[rounding, device] = held_weights(self.checkpoint.rounded(rounding), dtype, device).expert
            found.append(
                ShardSize(
                    self.groups[index],
                    device == "cuda",
                    tier.gpus if tier is not None else whole if on_gpu else 0.0,
                    {} if tier is None else tier.label_selector,
                    held[rounding, device],
                    experts.scaling_of(index, tier),
                )
            )
        return tuple(found)

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


def model_size(model: ModelConfig) -> ModelSize:
    """Raises ConfigError for a model whose sizes cannot be known here."""
    checkpoint = _known(model).rounded(model.engine.rounding)
    architecture = checkpoint.architecture
    local = architecture.is_dense or model.experts.transport == "local"
    groups = () if local else plan_groups(model.experts.groups, architecture.num_experts, 0, 1)
    return ModelSize(model, checkpoint, groups)


def _known(model: ModelConfig) -> Checkpoint:
    """Of a directory, an embedded model, or a hub id that is known. Raises ConfigError for others."""
    path = model.path
    if path in KNOWN_MODELS:
        known_model = KNOWN_MODELS[path]
        return outline(path, known_model.architecture, known_model.scheme)
    if path in EMBEDDED or is_directory(path):
        checkpoint = open_checkpoint(resolve_model(path, model.revision), model.model_impl)
        return checkpoint if checkpoint.model_impl == "native" else _checked(checkpoint, model.engine.max_model_len)
    known = ", ".join(KNOWN_MODELS)
    raise ConfigError(f"models: {path!r} is no directory here, and its sizes are not known; known are {known}")


def _checked(checkpoint: Checkpoint, max_model_len: int | None) -> Checkpoint:
    from experts_service.transformers_backend.meta_model import checked  # takes seconds to import

    return checked(checkpoint, max_model_len)


def pod_groups(config: MantaConfig) -> dict[str, PodGroup]:
    """By name, without those that have no pod. Raises DoesNotFit where a GPU is too small."""
    settings, models = config.kubernetes, [model_size(model) for model in config.models]
    for model in models:
        _check_gpus(model, settings.gpu_type)
    groups: dict[str, PodGroup] = {"gateway": _gateways(config)}
    if coordinators := [model for model in models if not model.shares_gpu]:
        lowest = sum(model.config.coordinators.min_replicas for model in coordinators)
        highest = sum(_with_surge(model.config, model.config.coordinators.max_replicas) for model in coordinators)
        largest = max(model.coordinator_host_bytes() for model in coordinators)
        gpus = int(any(model.on_gpu for model in coordinators))
        size = PodSize(settings.coordinator_cpus, _mib(NODE_BYTES + largest), gpus)
        groups["coordinator"] = PodGroup("coordinator", size, lowest, highest)
    for name, labels in expert_kinds(config).items():
        shards = [(model, one) for model in models for one in model.shards if tier_labels(config, one) == labels]
        groups[name] = _experts(shards, settings, labels)
    return groups


def expert_kinds(config: MantaConfig) -> dict[str, Mapping[str, str]]:
    """Names of pods for experts, and the labels that tell them apart: none where no model has tiers."""
    kinds: dict[str, Mapping[str, str]] = {}
    for model in config.models:
        for shard in model_size(model).shards:
            labels = tier_labels(config, shard)
            if labels not in kinds.values():
                tier = labels.get(TIER)
                name = "expert" if tier is None else f"expert-{tier}"
                alike = sum(other == name or other.startswith(f"{name}-") for other in kinds)
                kinds[name if not alike else f"{name}-{alike + 1}"] = labels
    return kinds


def tier_labels(config: MantaConfig, shard: ShardSize) -> dict[str, str]:
    """Of the pods that a shard may be in, beside the role's."""
    if not any(model.experts.tiers for model in config.models):
        return {}
    return {TIER: "gpu" if shard.on_gpu else "cpu", **shard.labels}


def head_size(cpus: int) -> PodSize:
    """No work is on the head: it is Ray's own."""
    return PodSize(cpus, _mib(HEAD_BYTES))


def _gateways(config: MantaConfig) -> PodGroup:
    gateway = config.gateway
    received = 2 * gateway.max_bytes_received  # over HTTP, and over gRPC
    memory = NODE_BYTES + GATEWAYS_PER_POD * (SERVICE_PROCESS_BYTES + received)
    size = PodSize(config.kubernetes.gateway_cpus, _mib(memory))
    return PodGroup("gateway", size, gateway.replicas.min_replicas, gateway.replicas.max_replicas)


def _experts(
    shards: Sequence[tuple[ModelSize, ShardSize]], settings: KubernetesConfig, labels: Mapping[str, str]
) -> PodGroup:
    """The pods of one kind, for those shards and for coordinators on their GPUs."""
    if not any(shard.on_gpu for _, shard in shards):
        memory = NODE_BYTES + sum(
            shard.host_bytes * _with_surge(model.config, shard.scaling.max_replicas) for model, shard in shards
        )
        cpus = settings.cpu_expert_cpus if labels and settings.cpu_expert_cpus else settings.expert_cpus
        size = PodSize(cpus, _mib(memory))
        return PodGroup("expert", size, settings.cpu_expert_pods, settings.cpu_expert_pods, labels)
    memory = NODE_BYTES + max(
        int(1 / shard.gpus + 1e-9 if 0 < shard.gpus < 1 else 1) * shard.host_bytes
        + (model.coordinator_host_bytes() if model.shares_gpu else 0)
        for model, shard in shards
    )
    lowest = _pods([shard.gpus for _, shard in shards for _ in range(shard.scaling.min_replicas)])
    most = [_with_surge(model.config, shard.scaling.max_replicas) for model, shard in shards]
    highest = _pods([shard.gpus for (_, shard), number in zip(shards, most, strict=True) for _ in range(number)])
    return PodGroup("expert", PodSize(settings.expert_cpus, _mib(memory), 1), lowest, highest, labels)


def _pods(shares: Sequence[float]) -> int:
    """With one GPU each, that hold processes with such shares of one."""
    free: list[float] = []
    for share in sorted(shares, reverse=True):
        place = next((index for index, left in enumerate(free) if left >= share - 1e-9), None)
        if place is None:
            free.append(1.0)
            place = len(free) - 1
        free[place] -= share
    return len(free)


def _with_surge(model: ModelConfig, replicas: int) -> int:
    """With those that a rolling update, or the drain of a machine, starts before the old ones stop."""
    return replicas + math.ceil(replicas * model.max_surge_percent / 100)


def _check_gpus(model: ModelSize, gpu_type: str | None) -> None:
    """Raises DoesNotFit unless every process of the model fits the GPU of its pod."""
    shards = [shard for shard in model.shards if shard.on_gpu for _ in range(shard.scaling.min_replicas)]
    num_coordinators = model.config.coordinators.min_replicas if model.on_gpu else 0
    if not shards and not num_coordinators:
        return
    if model.config.engine.kv_cache_gib is None and model.shares_gpu:
        raise ConfigError("engine.kv_cache_gib: say how much; the coordinator shares its GPU with a shard")
    memory = gpu_memory_bytes(gpu_type or "")
    fractions = [shard.gpus for shard in shards if 0 < shard.gpus < 1]
    share = 1 - max(fractions) if fractions else 1.0
    pods = _pods([shard.gpus for shard in shards] + [share] * num_coordinators)
    dtype = compute_dtype(model.config.engine.dtype, model.architecture)
    try:
        check_fit(
            model.architecture,
            dtype,
            [shard.group for shard in shards],
            Room([Node(f"pod {index}", 2**50, (memory,)) for index in range(pods)]),
            kv_tokens=model.kv_tokens,
            kv_dtype=model.kv_dtype,
            weights=model.held,
            num_coordinators=num_coordinators,
            gpus_per_coordinator=share,
            local=not model.groups,
            places=[ShardPlace(shard.gpus, shard.expert_bytes) for shard in shards],
        )
    except DoesNotFit as error:
        raise DoesNotFit(f"models: {model.config.name!r} on {gpu_type} GPUs: {error.message}") from error


def _mib(size: int) -> int:
    """With shared memory, rounded up to a quarter of a GiB."""
    return 256 * math.ceil((size / 2**20 + SHARED_MEMORY_MIB) / 256)
