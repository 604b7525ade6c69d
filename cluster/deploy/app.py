"""The roof: composes the Serve applications of a configuration. Decides layout; starts nothing and shows nothing.

gateway                HTTP and gRPC doors, the only application with a route
<model>-<version>      one per model version: coordinator, expert-0 … expert-<G-1>, and a root without replicas;
                       a group that is on several tiers has a deployment for each
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.configuration.generation_config import FILE as GENERATION_CONFIG
from cluster.checkpoint.quantization.rounding import Rounding
from cluster.config import (
    EngineConfig,
    ExpertsConfig,
    GatewayConfig,
    MantaConfig,
    ModelConfig,
    ScalingConfig,
    TierConfig,
    parse_config,
)
from cluster.errors import ConfigError
from cluster.expert_deployments import expert_deployment_name
from cluster.messages import ModelCard, Parsers
from cluster.planning.gpus import gpu_memory_bytes, lacks_bf16
from cluster.planning.placement import (
    DeviceShare,
    Dtype,
    ExpertGroup,
    Neighbour,
    Node,
    Room,
    ShardPlace,
    check_fit,
    device_shares,
    kv_bytes_per_token,
    kv_dtype,
    plan_groups,
    shared_gpu_bytes,
)
from cluster.planning.step_memory import step_bytes
from cluster.planning.weights import held_weights

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

GATEWAY = "gateway"


# Where GPUs are too few for every process to have its own, a shard leaves room for a coordinator beside it.
SHARED_GPU_OF_SHARD, SHARED_GPU_OF_COORDINATOR = 0.9, 0.1


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Ray cluster has to give."""

    num_cpus: int
    nodes: tuple[Node, ...]

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return sum(len(node.gpu_memory_bytes) for node in self.nodes)


@dataclass(frozen=True, slots=True)
class GroupOnTier:
    """The replicas of one group on one tier: a Serve deployment."""

    name: str
    group: ExpertGroup
    tier: TierConfig  # without tiers, what the coordinators are on
    scaling: ScalingConfig
    tiers: tuple[str, ...]  # the deployments of its group, where one of them begins without a replica
    rounding: Rounding | None
    fingerprint: str  # of the checkpoint, as its shards round it


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model, laid out on a cluster."""

    config: ModelConfig  # nothing in it is "auto" any more
    checkpoint: Checkpoint
    groups: tuple[ExpertGroup, ...]
    experts: tuple[GroupOnTier, ...]  # none when the coordinator runs them itself, or the model is dense
    gpus_per_shard: float  # where there are no tiers
    gpus_per_coordinator: float
    attempt: str = ""  # another one has Serve start what it has given up

    @property
    def application(self) -> str:
        """The name of its Serve application."""
        return application_name(self.config.name, self.config.version or self.checkpoint.fingerprint[:8])

    @property
    def expert_deployments(self) -> tuple[str, ...]:
        """Names of the experts' deployments."""
        return tuple(one.name for one in self.experts)


def describe_cluster(ray_nodes: Sequence[Mapping[str, Any]]) -> Cluster:
    """From what `ray.nodes()` says: alive nodes, their memory, and their GPUs by type."""
    nodes, num_cpus = [], 0
    for node in ray_nodes:
        if node["Alive"]:
            resources = node["Resources"]
            num_cpus += int(resources.get("CPU", 0))
            gpu = gpu_memory_bytes(node.get("Labels", {}).get("ray.io/accelerator-type", ""))
            gpus = (gpu,) * int(resources.get("GPU", 0))
            labels = node.get("Labels", {})
            nodes.append(Node(node["NodeManagerAddress"], int(resources.get("memory", 0)), gpus, labels))
    return Cluster(max(1, num_cpus), tuple(nodes))


def application_name(model: str, version: str) -> str:
    """`mixtral-1f2e3d4c`, of the characters that Serve and Ray take in names."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}-{version}"


def plan_models(
    configs: Sequence[ModelConfig], checkpoints: Sequence[Checkpoint], cluster: Cluster
) -> tuple[ModelPlan, ...]:
    """All models of a configuration, which have to fit side by side. Raises ConfigError or DoesNotFit."""
    room = Room(cluster.nodes)
    plans = tuple(plan_model(*each, cluster, room) for each in zip(configs, checkpoints, strict=True))
    check_applications((plan.config.name, plan.application) for plan in plans)
    return plans


def check_applications(models: Iterable[tuple[str, str]]) -> None:
    """Raises ConfigError where two models, by name and application, are one to Serve, which takes the last of them."""
    owners: dict[str, str] = {}
    for name, application in models:
        if application in owners:
            raise ConfigError(
                f"models: {owners[application]!r} and {name!r} would both be the Serve application {application!r}: "
                "give one of them another `version`"
            )
        owners[application] = name


def plan_model(config: ModelConfig, checkpoint: Checkpoint, cluster: Cluster, room: Room | None = None) -> ModelPlan:
    """Resolve everything that is "auto". Raises ConfigError, or DoesNotFit when the cluster is too small.

    The model takes its place in `room`: what others have left; without it the cluster is the model's own.
    """
    check_layout(config, checkpoint)
    architecture = checkpoint.architecture
    if architecture.is_dense:
        config = config.model_copy(update={"experts": ExpertsConfig(transport="local")})
    on_gpu = config.engine.device == "cuda" or (config.engine.device == "auto" and cluster.num_gpus > 0)
    if on_gpu and cluster.num_gpus == 1 and config.experts == ExpertsConfig():
        config = config.model_copy(update={"experts": ExpertsConfig(transport="local")})  # nothing to gain from lanes
    local = config.experts.transport == "local"
    # In one process the experts of a layer are one call, where they are one group.
    workers = (1, 1) if local else (cluster.num_gpus, cluster.num_cpus)
    groups = plan_groups(config.experts.groups, architecture.num_experts, *workers)
    dtype = compute_dtype(config.engine.dtype, architecture)
    if on_gpu and dtype == "bfloat16":
        _check_bf16(config.name, cluster)
    max_model_len = config.engine.max_model_len or architecture.max_position_embeddings
    check_scaled_groups(config.experts, len(groups))
    reserves = on_gpu or bool(config.experts.gpus_per_shard)
    num_shards = sum(config.experts.scaling_of(group.index, None).min_replicas for group in groups)
    gpus_per_shard, gpus_per_coordinator = _gpu_shares(config, num_shards, cluster.num_gpus) if reserves else (0.0, 0.0)
    if on_gpu and groups and not (local or config.experts.tiers or gpus_per_shard):
        raise ConfigError(
            f"models: {config.name!r}: experts.gpus_per_shard: a shard on cuda needs a part of a GPU; "
            "leave the key out, or put groups on CPUs with experts.tiers"
        )
    engine = config.engine.model_copy(
        update={
            "dtype": dtype,
            "device": "cuda" if on_gpu else "cpu",
            "max_model_len": max_model_len,
            "microbatches": 1 if config.engine.microbatches == "auto" else config.engine.microbatches,
        }
    )
    config = config.model_copy(update={"engine": engine})
    experts = _groups_on_tiers(config, groups, checkpoint, gpus_per_shard)
    at_start = [one for one in experts for _ in range(one.scaling.min_replicas)]
    check_fit(
        architecture,
        dtype,
        [one.group for one in at_start],
        room or Room(cluster.nodes),
        kv_tokens=max_model_len,
        kv_dtype=kv_dtype(engine.kv_cache_dtype, dtype, engine.device),
        weights=held_weights(checkpoint, dtype, engine.device),
        num_coordinators=config.coordinators.min_replicas,
        gpus_per_coordinator=gpus_per_coordinator,
        local=local,
        places=_places(at_start, config.experts.label_selector, checkpoint, dtype),
        name=config.name if config.version is None else f"{config.name}-{config.version}",
        label_selector=config.label_selector,
        shares_memory=config.experts.transport == "auto",
        rows_on_gpus=config.experts.rows_on_gpus,
    )
    return ModelPlan(
        config=config,
        checkpoint=checkpoint,
        groups=groups,
        experts=experts,
        gpus_per_shard=gpus_per_shard,
        gpus_per_coordinator=gpus_per_coordinator,
    )


def check_layout(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises ConfigError for settings that fit the model on no cluster: they are told before one is started."""
    architecture, experts = checkpoint.architecture, config.experts
    if not checkpoint.has_head and config.kind != "embedding":
        raise ConfigError(
            f"models: {config.name!r}: {checkpoint.directory} was saved without its output head, and answers nothing: "
            "with `kind: embedding` it makes embeddings"
        )
    if architecture.is_dense and experts not in (ExpertsConfig(), ExpertsConfig(transport="local")):
        raise ConfigError(f"models: {config.name!r} is a dense model, so `experts` has nothing to say about it")
    if experts.groups != "auto":
        try:
            check_scaled_groups(experts, len(plan_groups(experts.groups, architecture.num_experts, 0, 1)))
        except ConfigError as error:
            raise ConfigError(f"models: {config.name!r}: {error}") from None


def _check_bf16(model: str, cluster: Cluster) -> None:
    """Raises ConfigError where no card has it; of some that do not, the process that comes to one says so."""
    kinds = {(node.labels or {}).get("ray.io/accelerator-type", "") for node in cluster.nodes if node.gpu_memory_bytes}
    if kinds and all(map(lacks_bf16, kinds)):
        raise ConfigError(
            f"models: {model!r}: engine.dtype: {', '.join(sorted(kinds))} has no bfloat16; set float32, which "
            "takes 4 bytes a weight and runs launch by launch, or take GPUs of compute capability 8.0 or later"
        )


def _groups_on_tiers(
    config: ModelConfig, groups: Sequence[ExpertGroup], checkpoint: Checkpoint, gpus_per_shard: float
) -> tuple[GroupOnTier, ...]:
    """Of a model whose device is settled."""
    device, experts = config.engine.device, config.experts
    assert device != "auto", "a plan has no open settings"
    if experts.transport == "local":
        return ()
    fingerprints = {config.engine.rounding: checkpoint.fingerprint}
    found = []
    for name, index, tier, tiers in named_deployments(experts, len(groups)):
        rounding = config.rounding_of(tier)
        if rounding not in fingerprints:
            fingerprints[rounding] = checkpoint.rounded(rounding, "experts.tiers: quantization").fingerprint
        found.append(
            GroupOnTier(
                name=name,
                group=groups[index],
                tier=tier or TierConfig(device=device, gpus_per_shard=gpus_per_shard),
                scaling=experts.scaling_of(index, tier),
                tiers=tiers,
                rounding=rounding,
                fingerprint=fingerprints[rounding],
            )
        )
    return tuple(found)


def named_deployments(
    experts: ExpertsConfig, num_groups: int
) -> Iterator[tuple[str, int, TierConfig | None, tuple[str, ...]]]:
    """The experts' deployments: name, group, its tier where there are any, and as `GroupOnTier.tiers`."""
    for group in range(num_groups):
        tiers = experts.tiers_of(group)
        if not tiers:
            yield expert_deployment_name(group), group, None, ()
        named = {
            expert_deployment_name(group, position if number else None): tier
            for number, (position, tier) in enumerate(tiers.items())
        }
        waits = any(not experts.scaling_of(group, tier).min_replicas for tier in tiers.values())
        for name, tier in named.items():
            yield name, group, tier, tuple(named) if waits else ()


def _places(
    shards: Sequence[GroupOnTier], label_selector: Mapping[str, str], checkpoint: Checkpoint, dtype: Dtype
) -> list[ShardPlace]:
    """Of each; what a device cannot multiply as it is stored is widened there. `label_selector`: of all of them."""
    held = {
        kind: held_weights(checkpoint.rounded(kind[1]), dtype, kind[0]).expert
        for kind in {(one.tier.device, one.rounding) for one in shards}
    }
    return [
        ShardPlace(one.tier.gpus, held[one.tier.device, one.rounding], {**label_selector, **one.tier.label_selector})
        for one in shards
    ]


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for one that no gateway could load, before anybody has loaded weights."""
    from gateway.text.tokenizer_files import load_tokenizer

    load_tokenizer(checkpoint.directory, checkpoint.layout, checkpoint.architecture.vocab_size)


def check_scaled_groups(experts: ExpertsConfig, num_groups: int) -> None:
    """Raises ConfigError for a key of `group_scaling` that is no group."""
    for index in experts.group_scaling:
        if not 0 <= index < num_groups:
            raise ConfigError(f"experts.group_scaling: there is no group {index}; groups are 0 to {num_groups - 1}")


def _gpu_shares(config: ModelConfig, num_shards: int, num_gpus: int) -> tuple[float, float]:
    """GPUs of a shard and of a coordinator, which takes what those leave that have to be on its own.

    Coordinators are on cards of their own while there are enough, and those that are not divide what is left.
    """
    if num_shards == 0:
        return 0.0, 1.0
    if tiers := config.experts.tiers:
        fractions = [tier.gpus for tier in tiers if 0 < tier.gpus < 1]
        return 0.0, max(SHARED_GPU_OF_COORDINATOR, 1 - max(fractions)) if fractions else 1.0
    if (given := config.experts.gpus_per_shard) is not None:
        if given >= 1 or not given:
            return given, 1.0
        num_coordinators = max(1, config.coordinators.min_replicas)
        cards = min(num_coordinators, max(1, num_gpus))  # that have a coordinator
        elsewhere = (max(1, num_gpus) - cards) * int(1.0 / given + 1e-9)
        beside = max(1, -(-(num_shards - elsewhere) // cards))
        left = (1 - beside * given) / -(-num_coordinators // cards)
        return given, max(SHARED_GPU_OF_COORDINATOR, left)
    if config.experts.transport == "local" or num_gpus >= num_shards + config.coordinators.min_replicas:
        return 1.0, 1.0
    return SHARED_GPU_OF_SHARD, SHARED_GPU_OF_COORDINATOR


def _device_shares(plan: ModelPlan, beside: Sequence[ModelPlan]) -> tuple[DeviceShare, ...]:
    """Who may be on a coordinator's device, those of other models included."""
    neighbours = [shard for one in (plan, *beside) for shard in _shards(one)]
    return device_shares(
        gpus_per_coordinator=plan.gpus_per_coordinator,
        max_coordinators=plan.config.coordinators.max_replicas,
        neighbours=[*neighbours, *map(_coordinators, beside)],
    )


def _shards(plan: ModelPlan) -> Iterator[Neighbour]:
    """Those on GPUs."""
    dtype, on_gpus = plan.config.engine.dtype, [one for one in plan.experts if one.tier.gpus]
    assert dtype != "auto", "a plan has no open settings"
    of_slots = 0
    if plan.gpus_per_coordinator and plan.config.experts.transport == "auto" and plan.config.experts.rows_on_gpus:
        of_slots = shared_gpu_bytes(plan.checkpoint.architecture, dtype, plan.config.coordinators.max_replicas)
    for one, place in zip(on_gpus, _places(on_gpus, {}, plan.checkpoint, dtype), strict=True):
        yield Neighbour(place.gpus, len(one.group.experts) * place.expert_bytes + of_slots, one.scaling.max_replicas)


def _coordinators(plan: ModelPlan) -> Neighbour:
    engine, a, most = plan.config.engine, plan.checkpoint.architecture, plan.config.coordinators.max_replicas
    assert engine.dtype != "auto", "a plan has no open settings"
    of_token = kv_bytes_per_token(a, kv_dtype(engine.kv_cache_dtype, engine.dtype, engine.device))
    if engine.num_kv_blocks is not None:
        cache = engine.num_kv_blocks * engine.block_size * of_token
    elif engine.kv_cache_gib is not None:
        cache = int(engine.kv_cache_gib * 2**30)
    else:
        return Neighbour(plan.gpus_per_coordinator, None, most)
    local = not plan.experts
    weights = held_weights(plan.checkpoint, engine.dtype, engine.device)
    steps = step_bytes(
        a,
        engine.dtype,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len or a.max_position_embeddings,
        local_experts=local,
    )
    held = weights.coordinator + (a.num_experts * weights.expert if local else 0) + cache + steps
    return Neighbour(plan.gpus_per_coordinator, held, most)


def model_card(plan: ModelPlan) -> ModelCard:
    """What the gateway is told of a model."""
    checkpoint, config = plan.checkpoint, plan.config
    assert config.engine.max_model_len is not None, "a plan has no open settings"
    if keys := checkpoint.generation.not_followed:
        logger.warning("%s: requests do not follow %s", checkpoint.directory / GENERATION_CONFIG, ", ".join(keys))
    if not checkpoint.architecture.eos_token_ids:
        logger.warning("%s: no file says which token ends an answer; answers end at max_tokens", checkpoint.directory)
    return ModelCard(
        name=config.name,
        aliases=config.aliases,
        application=plan.application,
        directory=str(checkpoint.directory),
        layout=checkpoint.layout,
        fingerprint=checkpoint.fingerprint,
        max_model_len=config.engine.max_model_len,
        vocab_size=checkpoint.architecture.vocab_size,
        eos_token_ids=checkpoint.architecture.eos_token_ids,
        revision=checkpoint.revision,
        created=int(time.time()),
        defaults=checkpoint.generation.defaults,
        deployments=("coordinator", *plan.expert_deployments),
        num_layers=checkpoint.architecture.num_layers,
        num_experts=checkpoint.architecture.num_experts,
        top_k=checkpoint.architecture.top_k,
        kind=config.kind,
        pooling=config.pooling or "mean",
        hidden_size=checkpoint.architecture.hidden_size,
        parsers=Parsers(config.reasoning_parser, config.tool_parser),
    )


def without_numbers(model: ModelConfig) -> ModelConfig:
    """The model, however many replicas its deployments have."""
    tiers = tuple(tier.model_copy(update={"scaling": None}) for tier in model.experts.tiers)
    experts = model.experts.model_copy(update={"scaling": ScalingConfig(), "group_scaling": {}, "tiers": tiers})
    return model.model_copy(update={"experts": experts, "num_coordinators": 1, "coordinator_scaling": None})


def _code_version(*parts: object) -> str:
    """What an application's processes are made of. Where it stays the same Serve restarts none of them, and changes no
    more than their number."""
    return hashlib.sha256(repr((version("manta-serve"), *parts)).encode()).hexdigest()[:16]


def _model_version(plan: ModelPlan, gateway: GatewayConfig) -> str:
    not_read_there = {"name", "version", "aliases", "reasoning_parser", "tool_parser", "max_surge_percent"}
    settled = without_numbers(plan.config).model_dump_json(exclude=not_read_there)
    checkpoint = plan.checkpoint
    of_gateway = gateway.request_timeout_s, gateway.otlp_endpoint
    return _code_version(settled, str(checkpoint.directory), checkpoint.fingerprint, *of_gateway, plan.attempt)


def model_application(plan: ModelPlan, gateway: GatewayConfig, beside: Sequence[ModelPlan] = ()) -> Application:
    """Coordinator and experts of one model version; `beside`: the others on the same cluster."""
    from cluster.deploy.model_root import model_root
    from router_service.coordinator import coordinator_deployment

    config, checkpoint = plan.config, plan.checkpoint
    engine, experts = config.engine, with_lane_secret(config.experts)
    coordinator = coordinator_deployment(
        str(checkpoint.directory),
        checkpoint.fingerprint,
        checkpoint.model_impl,
        engine,
        experts,
        plan.groups,
        {one.name: one.fingerprint for one in plan.experts if one.fingerprint != checkpoint.fingerprint},
        _device_shares(plan, beside),
        *expert_applications(plan, experts, gateway).values(),
        scaling=config.coordinators,
        code_version=_model_version(plan, gateway),
        max_surge_percent=config.max_surge_percent,
        gpus=plan.gpus_per_coordinator,
        label_selector=config.label_selector,
        openmp_spin_count=engine.openmp_spin_count,
        otlp_endpoint=gateway.otlp_endpoint,
        request_timeout_s=gateway.request_timeout_s,
        # The engine's own bound is what refuses; Serve's only has to be beyond it.
        max_ongoing_requests=engine.max_num_seqs + 8 * engine.max_waiting + 1000,
        request_router="gateway.coordinators.router.CoordinatorRouter",
    )
    return model_root(coordinator)


def expert_applications(plan: ModelPlan, experts: ExpertsConfig, gateway: GatewayConfig) -> dict[str, Application]:
    """The experts' deployments by name, bound, for a coordinator to hold; `experts` has its lane secret."""
    from experts_service.service import expert_deployment
    from experts_service.shard.shard import ShardSpec

    config, checkpoint = plan.config, plan.checkpoint
    assert config.engine.dtype != "auto", "a plan has no open settings"
    machines = [(one.tier.device, one.tier.label_selector) for one in plan.experts]  # as far as can be known
    return {
        one.name: expert_deployment(
            ShardSpec(
                application=plan.application,
                directory=str(checkpoint.directory),
                fingerprint=one.fingerprint,
                model_impl=checkpoint.model_impl,
                group=one.group.index,
                deployment=one.name,
                experts=one.group.experts,
                num_groups=machines.count((one.tier.device, one.tier.label_selector)),  # that share a machine's cores
                dtype=config.engine.dtype,
                device=one.tier.device,
                num_threads=experts.num_threads,
                kernels=config.engine.kernels,
                batch_invariant=config.engine.batch_invariant,
                rounding=one.rounding,
                gpus=one.tier.gpus,
                load_timeout_s=experts.load_timeout_s,
                lane_secret_file=experts.lane_secret_file,
            ),
            one.scaling,
            code_version=_model_version(plan, gateway),
            tiers=one.tiers,
            max_surge_percent=config.max_surge_percent,
            label_selector=experts.label_selector | one.tier.label_selector,
            request_timeout_s=gateway.request_timeout_s,
        )
        for one in plan.experts
    }


def with_lane_secret(experts: ExpertsConfig) -> ExpertsConfig:
    """The same with the path of a secret that can be read here, where lanes need one."""
    from experts_service.wire.secret import ensure_lane_secret

    if experts.transport not in ("auto", "lane"):
        return experts
    given = experts.lane_secret_file
    path = ensure_lane_secret(None if given is None else Path(given))
    return experts.model_copy(update={"lane_secret_file": str(path)})


def check_doors(gateway: GatewayConfig) -> None:
    """Raises ConfigError for doors that would stand open, or in each other's place."""
    from gateway.admission.access import is_loopback

    if gateway.http_port == gateway.grpc_port:
        raise ConfigError(f"gateway.grpc_port: {gateway.grpc_port} is HTTP's port as well; gRPC needs one of its own")
    if gateway.api_keys_file is None and not is_loopback(gateway.host):
        raise ConfigError(
            f"gateway.host: {gateway.host} can be reached from other machines, which needs API keys: "
            "give --api-keys-file (gateway.api_keys_file; `manta keys new` makes an entry), or stay on 127.0.0.1"
        )


def run_targets(config: MantaConfig, plans: tuple[ModelPlan, ...]) -> list[Any]:
    """All applications for `serve.run_many`; the gateway first, so that /health answers while models load."""
    cards = tuple(model_card(plan) for plan in plans)
    return [gateway_target(config.gateway, cards), *model_targets(config.gateway, plans)]


def gateway_target(config: GatewayConfig, cards: tuple[ModelCard, ...]) -> Any:
    """The gateway for `serve.run_many`."""
    from ray import serve

    from gateway.service import gateway_application

    numbers = {"num_replicas", "scaling"}
    code_version = _code_version(config.model_dump_json(exclude=numbers), *(replace(card, created=0) for card in cards))
    return serve.RunTarget(gateway_application(config, cards, code_version), name=GATEWAY, route_prefix="/")


def model_targets(gateway: GatewayConfig, plans: tuple[ModelPlan, ...]) -> list[Any]:
    """The models for `serve.run_many`."""
    from ray import serve

    return [
        serve.RunTarget(
            model_application(plan, gateway, [other for other in plans if other is not plan]),
            name=plan.application,
            route_prefix=None,
        )
        for plan in plans
    ]


def demo_config() -> MantaConfig:
    """What `manta serve` serves without a model: the embedded demo models, under the names of Mistral's endpoints."""
    from cluster.demo_model import DENSE_DIRECTORY, DIRECTORY

    # One thread each: matrices this small are no faster on more. Their place is beside a model that has the GPU.
    tiny = EngineConfig(device="cpu", kv_cache_gib=0.0625, num_threads=1)
    return MantaConfig(
        models=(
            ModelConfig(
                name="mistral-small",
                path=str(DIRECTORY),
                aliases=("mistral-medium", "manta-demo"),
                engine=EngineConfig(kv_cache_gib=0.25),
            ),
            ModelConfig(name="mistral-tiny", path=str(DENSE_DIRECTORY), engine=tiny),
            ModelConfig(name="mistral-embed", path=str(DENSE_DIRECTORY), kind="embedding", pooling="mean", engine=tiny),
        )
    )


def directory_config(model: str, directory: Path) -> MantaConfig:
    """What `manta serve MODEL` serves: the one model, called by its own name. Raises ConfigError where that is none."""
    own = model.rstrip("/").rsplit("/", 1)[-1]
    name = directory.name if own in ("", ".", "..") else own
    return parse_config({"models": [{"name": name, "path": str(directory)}]}, source=model)
