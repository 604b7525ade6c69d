"""`manta plan`: which processes a model needs on GPUs of one type, and what they would do. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, ModelImpl, open_checkpoint
from cluster.checkpoint.hub import EMBEDDED, is_directory, resolve_model
from cluster.checkpoint.known_models import KNOWN_MODELS
from cluster.checkpoint.outline import outline
from cluster.commands.bench.shapes import SHAPES
from cluster.commands.plan.machine import machine_of
from cluster.commands.plan.observed import observe
from cluster.commands.plan.tiers import look_at, propose
from cluster.config import EngineConfig, ModelConfig, load_config, parse_config
from cluster.errors import ConfigError
from cluster.planning.costs import ASSUMED, LAYER_S, OF_CPUS, Costs, Figure
from cluster.planning.gpus import GpuType, gpu_type
from cluster.planning.placement import ExpertGroup, check_kv_dtype, plan_groups
from cluster.planning.plan import Layout, Plan, Planner, Target, group_list
from cluster.planning.profile import Profile
from cluster.planning.roofline import Link, Load, Model
from cluster.planning.weights import held_weights

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_GPU = "H100"
NOT_KNOWN_OF_TRANSFORMERS = (  # a model that its code computes
    "operations are those of a plain decoder of these sizes",
    "which layers have experts",
    "how fast that code is: attention copies the context. On a CPU a step took 6 to 16 times as long as by code of "
    "ours; nothing has measured it on a GPU",
)
HUB_IDS = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
}


@dataclass(frozen=True)
class Question:
    """What the command was asked."""

    gpu: str | None  # None: H100, or what --gpu-memory says
    target: Target
    lanes: Link | None = None  # None: as measured
    any_load: bool = False  # nobody said how many sequences
    dtype: str = "auto"
    quantization: str | None = None  # None: as the configuration says
    gpu_memory: str | None = None
    ram: str | None = None
    ram_bandwidth: float | None = None  # bytes a second
    cores: int | None = None
    observed: str | None = None  # URL
    observed_token_file: Path | None = None
    profile: Profile | None = None

    @property
    def costs(self) -> Costs:
        """Measured on the user's machine as far as there is a profile of it."""
        return ASSUMED if self.profile is None else self.profile.costs()

    @property
    def card(self) -> GpuType | None:
        """That was asked for, or of the profile. Raises ConfigError."""
        if self.gpu is not None:
            return gpu_type(self.gpu)
        return None if self.profile is None else self.profile.gpu


def run(model: str | None, config_file: Path | None, question: Question, as_json: bool) -> None:
    """Plan the one model, or every model of a configuration. Raises ConfigError or DoesNotFit."""
    if (model is None) == (config_file is None):
        raise ConfigError("give either MODEL or --config")
    configs = load_config(config_file).models if config_file else (_of_name(str(model)),)
    shown = [_plan(config, question, chosen=config_file is not None) for config in configs]
    if as_json:
        print(json.dumps([json_document for json_document, _ in shown]))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for _, draw_on in shown:
        draw_on(console)


def _of_name(model: str) -> ModelConfig:
    path = HUB_IDS.get(model, model)
    return ModelConfig(name=model.rstrip("/").rsplit("/", 1)[-1], path=path)


def _plan(config: ModelConfig, question: Question, *, chosen: bool) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """As JSON, and what draws it."""
    from cluster.commands.plan import tables

    if question.target.gpus == 0 and question.ram is None:
        raise ConfigError("--gpus 0: how much memory is there? Give --ram (16GB)")
    if question.ram is not None or question.gpu_memory is not None or (chosen and config.experts.tiers):
        return _plan_tiers(config, question, chosen=chosen)
    if question.observed is not None:
        raise ConfigError("--observed: it says which experts are on the GPU, beside those in --ram")
    checkpoint = checkpoint_of(config.path, config.model_impl)
    planner, plan = plan_one(config, checkpoint, question, chosen=chosen)
    unknown = NOT_KNOWN_OF_TRANSFORMERS if checkpoint.model_impl == "transformers" else ()

    def draw(console: Console) -> None:
        tables.draw(config.name, question.target, planner, plan, console)
        tables.draw_figures(figures(question, plan), console)
        if checkpoint.widened:
            console.print(f"Bytes are those in memory: {checkpoint.widening(planner.model.dtype)}.")
        for one in unknown:
            console.print(f"Not known: {one}.")

    shown = document(config.name, question, planner, plan)
    return shown | {"not_known": unknown, "widened": checkpoint.widened}, draw


def _plan_tiers(
    config: ModelConfig, question: Question, *, chosen: bool
) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from cluster.commands.plan import tiers_tables

    has_tiers = chosen and bool(config.experts.tiers)
    if question.ram is None and not has_tiers:
        raise ConfigError("--gpu-memory: how much memory is beside the card? Give --ram (64GB)")
    checkpoint, load = checkpoint_of(config.path, config.model_impl), question.target.load
    if checkpoint.model_impl == "transformers":
        raise ConfigError(f"--ram: {config.path} is for transformers' code, whose weights are not rounded for tiers")
    if question.any_load:
        load = Load(1, load.context)
    observed = None
    if question.observed is not None:
        experts = checkpoint.architecture.num_experts
        observed = observe(question.observed, question.observed_token_file, config.name, experts)
    card = question.card
    if card is None and has_tiers and question.gpu_memory is None:
        card = gpu_type(DEFAULT_GPU)
    of_profile = None if question.profile is None else question.profile.measured("cpu_bandwidth")
    machine = machine_of(
        card,
        question.gpu_memory,
        question.ram,
        cards=question.target.gpus if question.target.gpus is not None else _cards(config) if has_tiers else 1,
        ram_bandwidth=question.ram_bandwidth,
        measured=of_profile,
        cores=question.cores,
    )
    engine = engine_of(config, question)
    config = config.model_copy(update={"engine": engine})
    if has_tiers:
        planned = look_at(config, checkpoint, machine, load, question.lanes, observed, question.costs)
    else:
        wanted = None if engine.quantization == "none" else engine.quantization
        planned = propose(config, checkpoint, machine, load, wanted, question.lanes, observed, question.costs)
    on_cpus = planned.times.cpu_s > 0 or not machine.cards
    of_cards = (*question.costs.of_gpus, *_of_rows(question, local=planned.local))
    used = (
        *(of_cards if machine.cards else (LAYER_S,)),
        *((question.costs.memory_bandwidth,) if any(one.shares_memory for one in planned.tiered.shards) else ()),
        *(OF_CPUS if on_cpus else ()),
        *machine.assumed(on_cpus=on_cpus),
    )
    return tiers_tables.document(planned, used), lambda console: tiers_tables.draw(planned, used, console)


def _cards(config: ModelConfig) -> int:
    """That a configuration with tiers begins on, full ones."""
    experts = config.experts
    shares = [
        tier.gpus
        for group in range(len(experts.groups))
        for tier in experts.tiers_of(group).values()
        if experts.scaling_of(group, tier).min_replicas
    ]
    left = [1 - share for share in shares if 0 < share < 1]
    of_coordinator = 0.0 if config.engine.device == "cpu" else min(left, default=1.0)
    return max(1, ceil(sum(shares) + config.coordinators.min_replicas * of_coordinator - 1e-9))


def plan_one(config: ModelConfig, checkpoint: Checkpoint, question: Question, *, chosen: bool) -> tuple[Planner, Plan]:
    """The best layout, or with `chosen` the one that the configuration says where it says one."""
    engine = engine_of(config, question)
    dtype = compute_dtype(engine.dtype, checkpoint.architecture)
    check_kv_dtype(engine.kv_cache_dtype, "cuda")
    weights = held_weights(checkpoint.rounded(engine.rounding), dtype, "cuda")
    model = Model(checkpoint.architecture, dtype, weights)
    costs = question.costs
    planner = Planner(model, question.card or gpu_type(DEFAULT_GPU), question.lanes or costs.lanes, costs)
    experts, coordinators = config.experts, config.coordinators.min_replicas
    if chosen and experts.transport == "local":
        return planner, planner.evaluate(Layout((), coordinators), question.target)
    if not chosen or experts.groups == "auto":
        return planner, planner.plan(question.target)
    groups: tuple[ExpertGroup, ...] = plan_groups(experts.groups, checkpoint.architecture.num_experts, 1, 1)
    shared = experts.gpus_per_shard is not None and experts.gpus_per_shard < 1
    return planner, planner.evaluate(Layout(groups, coordinators, shared), question.target)


def engine_of(config: ModelConfig, question: Question) -> EngineConfig:
    """As configured, or as the command says instead. Raises ConfigError."""
    changes = {"dtype": question.dtype} if question.dtype != "auto" else {}
    if question.quantization is not None:
        changes["quantization"] = question.quantization
    document = {"name": config.name, "path": config.path, "engine": config.engine.model_dump() | changes}
    return parse_config({"models": [document]}, source="manta plan").models[0].engine


def checkpoint_of(path: str, model_impl: Literal["auto"] | ModelImpl = "auto") -> Checkpoint:
    """Of a directory or an embedded model; an outline of a model of the hub that is known, or of a named shape."""
    if is_directory(path):
        checkpoint = open_checkpoint(resolve_model(path), model_impl)
        if checkpoint.model_impl == "native":
            return checkpoint
        from experts_service.transformers_backend.meta_model import checked  # takes seconds to import

        return checked(checkpoint, 1)  # how long its context may be is not asked here
    if path in EMBEDDED:
        return open_checkpoint(EMBEDDED[path])
    if path in KNOWN_MODELS:
        return outline(path, KNOWN_MODELS[path].architecture, KNOWN_MODELS[path].scheme)
    if path in SHAPES:
        return outline(path, SHAPES[path])
    known = ", ".join(dict.fromkeys((*SHAPES, *HUB_IDS, *KNOWN_MODELS)))
    raise ConfigError(f"{path!r} is no directory; shapes that are known by name: {known}")


def figures(question: Question, plan: Plan) -> tuple[Figure, ...]:
    """What the plan is made of, beside the data sheet."""
    hops = (question.costs.hop,) if plan.rival == "tensor parallelism" else ()
    hops = (*hops, *question.costs.of_steps) if plan.rival else hops
    return (*question.costs.of_gpus, *_of_rows(question, local=plan.layout.local), *hops)


def _of_rows(question: Question, *, local: bool) -> tuple[Figure, ...]:
    """What rows cost between processes, or steps where there are none."""
    if local:
        return question.costs.of_steps
    return (*(question.costs.of_lanes if question.lanes is None else ()), *question.costs.of_copies)


def document(name: str, question: Question, planner: Planner, plan: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, and null where there is nothing."""
    target = asdict(question.target)
    target["step_s"] = None if question.target.step_s == inf else question.target.step_s
    ratio = plan.attention_per_expert_gpu
    return {
        "model": name,
        "gpu": asdict(planner.gpu),
        "dtype": planner.model.dtype,
        "target": target,
        "weight_bytes": planner.model.all_bytes,
        "lanes": asdict(planner.lanes),
        "layout": {
            "groups": group_list(plan.layout.groups),
            "coordinators": plan.layout.coordinators,
            "shared": plan.layout.shared,
            "local": plan.layout.local,
            "gpus": plan.layout.gpus,
        },
        "processes": [asdict(process) for process in plan.processes],
        "floor_s": plan.floor_s,
        "step_s": plan.step_s,
        "attention_s": plan.attention_s,
        "experts_s": plan.experts_s,
        "wire_s": plan.wire_s,
        "host_s": plan.host_s,
        "first_token_s": plan.first_token_s,
        "meets_target": plan.meets_target,
        "attention_per_expert_gpu": None if ratio == inf else ratio,
        "rival": plan.rival,
        "rival_gpus": plan.rival_gpus,
        "loses_at": plan.loses_at,
        "comparisons": [asdict(one) for one in plan.comparisons],
        "figures": [one.document() for one in figures(question, plan)],
    }
