"""`manta plan --ram`: experts on a card and in a CPU's memory. Proposes a configuration, or looks at one with tiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from cluster.checkpoint.architecture import compute_dtype, expert_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.plan.machine import Machine
from cluster.commands.plan.observed import Observed
from cluster.config import ModelConfig, Quantization, parse_config
from cluster.deploy.app import Cluster, ModelPlan, plan_model
from cluster.errors import ConfigError, DoesNotFit
from cluster.planning.costs import ASSUMED, Costs
from cluster.planning.hot_experts import Split, splits
from cluster.planning.placement import (
    SERVICE_PROCESS_BYTES,
    TORCH_PROCESS_BYTES,
    WeightBytes,
    gib,
    kv_bytes_per_token,
    kv_dtype,
    shared_gpu_bytes,
    shared_memory_bytes,
)
from cluster.planning.plan import USABLE
from cluster.planning.roofline import Link, Load, Model
from cluster.planning.step_memory import step_bytes
from cluster.planning.tiers import Shard, TieredModel, Times, chances
from cluster.planning.weights import held_bits, held_weights

CPU_FORMATS = ("none", "int8", "int4")  # fp8 is off by more than int8, and no smaller
GPUS_PER_SHARD = 0.9  # what is left is the coordinator's


@dataclass(frozen=True)
class TieredPlan:
    """A configuration with experts on GPUs and CPUs, and what is expected of it."""

    config: ModelConfig
    plan: ModelPlan
    machine: Machine
    tiered: TieredModel
    load: Load
    times: Times
    first_token_s: float
    cache_bytes: int
    step_bytes: int
    observed: Observed | None = None
    proposed: bool = False  # else it was given
    others: tuple[tuple[Split, Times], ...] = ()  # that fit as well

    @property
    def local(self) -> bool:
        """Whether all experts are in the coordinator."""
        return not self.plan.experts

    @property
    def coordinator_bytes(self) -> int:
        """Weights of one."""
        model = self.tiered.model
        return model.all_bytes if self.local else model.coordinator_bytes


def look_at(
    config: ModelConfig,
    checkpoint: Checkpoint,
    machine: Machine,
    load: Load,
    lanes: Link | None = None,
    observed: Observed | None = None,
    costs: Costs = ASSUMED,
) -> TieredPlan:
    """What a configuration does on a machine. Raises DoesNotFit where it does not fit."""
    architecture = checkpoint.architecture
    rounded = checkpoint.rounded(config.engine.rounding)
    plan = plan_model(config, rounded, Cluster(1, (machine.node,)))
    engine, dtype = plan.config.engine, compute_dtype(config.engine.dtype, architecture)
    assert engine.max_model_len is not None, "a plan has no open settings"
    assert engine.device != "auto", "a plan has no open settings"
    kept_in = kv_dtype(engine.kv_cache_dtype, dtype, engine.device)
    weights = held_weights(rounded, dtype, engine.device)
    local = not plan.experts
    tiered = TieredModel(
        Model(architecture, dtype, weights),
        engine.device == "cuda",
        machine.card,
        machine.cpus,
        (() if architecture.is_dense else (_all_experts(plan, weights, dtype),))
        if local
        else tuple(_shards(plan, checkpoint, dtype, over_lanes=lanes is not None)),
        chances(None if observed is None else observed.rows, architecture.num_experts, architecture.top_k),
        None if local else lanes or costs.lanes,
        costs,
    )
    tokens = max(engine.max_model_len, math.ceil(load.sequences * load.context))
    planned = TieredPlan(
        config=config,
        plan=plan,
        machine=machine,
        tiered=tiered,
        load=load,
        times=tiered.step(load),
        first_token_s=tiered.first_token_s(load.context),
        cache_bytes=tokens * kv_bytes_per_token(architecture, kept_in),
        step_bytes=_step_bytes(plan.config, checkpoint, dtype),
        observed=observed,
    )
    needs, usable = planned.coordinator_bytes + planned.cache_bytes, USABLE * machine.card.memory_bytes
    if tiered.on_gpu and needs > usable:
        raise DoesNotFit(
            f"models: {config.name!r}: the coordinator needs {gib(needs)} for {load.sequences:g} sequences of "
            f"{load.context} tokens, and the card has {gib(usable)} to use"
        )
    return planned


def propose(
    config: ModelConfig,
    checkpoint: Checkpoint,
    machine: Machine,
    load: Load,
    wanted: str | None = None,
    lanes: Link | None = None,
    observed: Observed | None = None,
    costs: Costs = ASSUMED,
) -> TieredPlan:
    """The configuration with the best quality that fits, and of that the one with most experts on the cards.

    `wanted`: what experts on CPUs are rounded to; None: as little as may be. Raises DoesNotFit.
    """
    if not machine.cards:
        return _propose_on_cpus(config, checkpoint, machine, load, wanted, costs)
    architecture = checkpoint.architecture
    if architecture.is_dense:
        raise ConfigError(f"{config.path} is a dense model: it has no experts to put on tiers")
    dtype = compute_dtype(config.engine.dtype, architecture)
    engine = config.engine.model_dump(exclude_defaults=True) | {
        "device": "cuda",
        "dtype": dtype,
        "max_model_len": load.context,
        "kv_cache_gib": _cache_gib(checkpoint, dtype, load),
    }
    plain = replace_engine(config, {key: value for key, value in engine.items() if not key.startswith("quanti")})
    weights = held_weights(checkpoint, dtype, "cuda")
    of_coordinator = (
        weights.coordinator + plain.engine.kv_cache_gib * 2**30 + _step_bytes(plain, checkpoint, dtype)  # type: ignore[operator]
    )
    usable = USABLE * machine.card.memory_bytes
    if of_coordinator > usable:
        raise DoesNotFit(
            f"the coordinator needs {gib(of_coordinator)} (weights {gib(weights.coordinator)}, a cache of "
            f"{plain.engine.kv_cache_gib:g} GiB, the rest for steps), and the card has {gib(usable)} to use"
        )
    held = _held(checkpoint, dtype)
    if wanted is not None and ("cuda", wanted) not in held:
        raise ConfigError(f"engine.quantization: {config.path} is quantised already; leave it out")
    memory = machine.node.memory_bytes - (machine.cards + 2) * (SERVICE_PROCESS_BYTES + TORCH_PROCESS_BYTES)
    memory -= (machine.cards + 1) * shared_memory_bytes(architecture, dtype)  # a shard on each card, one on CPUs
    on_cards = usable - of_coordinator - shared_gpu_bytes(architecture, dtype, 1)
    by_use = sorted(range(architecture.num_experts), key=lambda expert: -observed.rows[expert] if observed else 0)
    found = [
        (split, look_at(_configured(plain, split), checkpoint, machine, load, lanes, observed, costs))
        for split in splits(by_use, machine.cards, on_cards, memory, held)
        if wanted is None or not split.on_cpus or split.cpu_format == wanted
    ]
    if not found:
        smallest = min(
            size for (device, format_), size in held.items() if device == "cpu" and wanted in (None, format_)
        )
        most = machine.cards * int(
            (usable - of_coordinator) // min(size for (of, _), size in held.items() if of == "cuda")
        )
        left = max(0, architecture.num_experts - most)
        raise DoesNotFit(
            f"{machine.cards} × {gib(machine.card.memory_bytes)} hold {most} of {architecture.num_experts} experts; "
            f"the others need {gib(left * smallest)} of memory in the smallest format, and of "
            f"{gib(machine.ram_bytes or 0)} there are {gib(max(0, memory))} left for them"
        )
    (_, best), *others = found
    return replace(best, proposed=True, others=tuple((split, one.times) for split, one in others))


def _propose_on_cpus(
    config: ModelConfig, checkpoint: Checkpoint, machine: Machine, load: Load, wanted: str | None, costs: Costs
) -> TieredPlan:
    """All of it in one process, in the best format that fits. Raises DoesNotFit."""
    architecture = checkpoint.architecture
    dtype = compute_dtype(config.engine.dtype, architecture)
    engine = {key: value for key, value in config.engine.model_dump(exclude_defaults=True).items() if key != "dtype"}
    engine |= {
        "device": "cpu",
        "dtype": dtype,
        "max_model_len": load.context,
        "kv_cache_gib": _cache_gib(checkpoint, dtype, load),
    }
    held = _held(checkpoint, dtype)
    if wanted is not None and ("cpu", wanted) not in held:
        raise ConfigError(f"engine.quantization: {config.path} is quantised already; leave it out")
    found: list[tuple[Split, TieredPlan]] = []
    refusal: DoesNotFit | None = None
    for format_ in (wanted,) if wanted else [one for one in CPU_FORMATS if ("cpu", one) in held]:
        rounded = {} if format_ == "none" else {"quantization": format_}
        local = {} if architecture.is_dense else {"experts": {"transport": "local"}}
        document = config.model_dump(exclude_defaults=True) | {"engine": engine | rounded} | local
        try:
            planned = look_at(_parsed(config, document), checkpoint, machine, load, costs=costs)
        except DoesNotFit as error:
            refusal = error
            continue
        found.append((Split((), tuple(range(architecture.num_experts)), "none", format_), planned))
    if not found:
        assert refusal is not None, "something was tried"
        raise refusal
    (_, best), *others = found
    return replace(best, proposed=True, others=tuple((split, one.times) for split, one in others))


def replace_engine(config: ModelConfig, engine: dict[str, Any]) -> ModelConfig:
    """The same model on another engine, checked as a file would be."""
    return _parsed(config, config.model_dump(exclude_defaults=True) | {"engine": engine})


def _configured(plain: ModelConfig, split: Split) -> ModelConfig:
    """Of a split. Without experts on CPUs there are no tiers: one card has all, or each has a group."""
    experts: dict[str, Any]
    on_cards = {"gpus_per_shard": GPUS_PER_SHARD}
    rounded = {} if split.gpu_format == "none" else {"quantization": split.gpu_format}
    engine = plain.engine.model_dump(exclude_defaults=True)
    if not split.on_cpus:
        engine |= rounded
        several = {"groups": split.on_gpus, **on_cards}
        experts = {"transport": "local"} if len(split.on_gpus) == 1 else several
    else:
        tiers: list[dict[str, Any]] = []
        if split.on_gpus:
            tiers.append({"groups": tuple(range(len(split.on_gpus))), "device": "cuda", **on_cards, **rounded})
        of_cpus = {} if split.cpu_format == "none" else {"quantization": split.cpu_format}
        tiers.append({"groups": (len(split.on_gpus),), "device": "cpu", **of_cpus})
        experts = {"groups": (*split.on_gpus, split.on_cpus), "tiers": tiers}
    return _parsed(plain, plain.model_dump(exclude_defaults=True) | {"engine": engine, "experts": experts})


def _parsed(config: ModelConfig, document: dict[str, Any]) -> ModelConfig:
    return parse_config({"models": [{"name": config.name, "path": config.path} | document]}, "manta plan").models[0]


def _held(checkpoint: Checkpoint, dtype: Any) -> dict[tuple[str, str], int]:
    """Bytes of one expert by device and format; of a checkpoint that is quantised already, as it is."""
    found: dict[tuple[str, str], int] = {}
    for name in get_args(Quantization):
        engine = {"quantization": name}
        config = parse_config({"models": [{"name": "m", "path": "m", "engine": engine}]}).models[0]
        try:
            rounded = checkpoint.rounded(config.engine.rounding)
        except ConfigError:
            continue
        for device in ("cpu", "cuda"):
            found[device, name] = held_weights(rounded, dtype, device).expert
    return found


def _cache_gib(checkpoint: Checkpoint, dtype: Any, load: Load) -> float:
    """For all sequences, in whole blocks, rounded up."""
    blocks = load.sequences * math.ceil(load.context / 256) * 256  # a multiple of any block's size
    return math.ceil(blocks * kv_bytes_per_token(checkpoint.architecture, dtype) / 2**30 * 1000) / 1000


def _step_bytes(config: ModelConfig, checkpoint: Checkpoint, dtype: Any) -> int:
    engine = config.engine
    return step_bytes(
        checkpoint.architecture,
        dtype,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len or checkpoint.architecture.max_position_embeddings,
        local_experts=True,
    )


def _all_experts(plan: ModelPlan, weights: WeightBytes, dtype: Any) -> Shard:
    """Those of a coordinator that has them itself."""
    device = plan.config.engine.device
    assert device != "auto", "a plan has no open settings"
    a = plan.checkpoint.architecture
    bits = _bits(plan.checkpoint, dtype, device)
    return Shard("coordinator", tuple(range(a.num_experts)), device, 1.0, {}, weights.expert, bits)


def _shards(plan: ModelPlan, checkpoint: Checkpoint, dtype: Any, *, over_lanes: bool) -> Sequence[Shard]:
    """Of all groups, on each of their tiers that they begin on. `over_lanes`: whoever asks says what these carry."""
    by_memory = plan.config.experts.transport == "auto" and not over_lanes
    begun = [one for one in plan.experts if one.scaling.min_replicas]
    shards = []
    for one in begun:
        rounded = checkpoint.rounded(one.rounding)
        shards.append(
            Shard(
                name=one.name,
                experts=one.group.experts,
                device=one.tier.device,
                gpus=one.tier.gpus,
                machine=one.tier.label_selector,
                expert_bytes=held_weights(rounded, dtype, one.tier.device).expert,
                bits=_bits(rounded, dtype, one.tier.device),
                share=1 / sum(other.group == one.group for other in begun),
                # Without labels it is on the one machine that is planned for, as the coordinator.
                shares_memory=by_memory and one.tier.device == "cpu" and not one.tier.label_selector,
            )
        )
    return shards


def _bits(checkpoint: Checkpoint, dtype: Any, device: str) -> int:
    a = checkpoint.architecture
    names = [name for layer in range(a.num_layers) for name in expert_tensors(a, layer, 0)]
    return max((held_bits(checkpoint.tensors[name], dtype, device) for name in names), default=0)
