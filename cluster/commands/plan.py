"""`manta plan`: which processes a model needs on GPUs of one type, and what they would do. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import EMBEDDED
from cluster.checkpoint.known_models import KNOWN_MODELS, MIXTRAL_8X22B
from cluster.checkpoint.outline import outline
from cluster.commands.bench.shapes import SHAPES
from cluster.config import EngineConfig, ModelConfig, load_config, parse_config
from cluster.errors import ConfigError
from cluster.planning.costs import LANES, OF_COPIES, OF_GPUS, OF_LANES, Figure
from cluster.planning.gpus import gpu_type
from cluster.planning.placement import ExpertGroup, check_kv_dtype, plan_groups
from cluster.planning.plan import Layout, Plan, Planner, Target, group_list
from cluster.planning.roofline import Link, Model
from cluster.planning.weights import held_weights

NAMED_SHAPES = {**SHAPES, "mixtral-8x22b": MIXTRAL_8X22B}


@dataclass(frozen=True)
class Question:
    """What the command was asked."""

    gpu: str
    target: Target
    lanes: Link | None = None  # None: as measured
    dtype: str = "auto"
    quantization: str | None = None  # None: as the configuration says


def run(model: str | None, config_file: Path | None, question: Question, as_json: bool) -> None:
    """Plan the one model, or every model of a configuration. Raises ConfigError or DoesNotFit."""
    if (model is None) == (config_file is None):
        raise ConfigError("give either MODEL or --config")
    configs = load_config(config_file).models if config_file else (ModelConfig(name=str(model), path=str(model)),)
    plans = [(config, *plan_one(config, question, chosen=config_file is not None)) for config in configs]
    if as_json:
        print(json.dumps([document(config.name, question, planner, plan) for config, planner, plan in plans]))
        return
    from rich.console import Console

    from cluster.commands.plan_tables import draw, draw_figures

    console = Console(highlight=False)
    for config, planner, plan in plans:
        draw(config.name, question.target, planner, plan, console)
        draw_figures(figures(question, plan), console)


def plan_one(config: ModelConfig, question: Question, *, chosen: bool) -> tuple[Planner, Plan]:
    """The best layout, or with `chosen` the one that the configuration says where it says one."""
    checkpoint, engine = checkpoint_of(config.path), engine_of(config, question)
    dtype = compute_dtype(engine.dtype, checkpoint.architecture)
    check_kv_dtype(engine.kv_cache_dtype, "cuda")
    weights = held_weights(checkpoint.rounded(engine.rounding), dtype, "cuda")
    model = Model(checkpoint.architecture, dtype, weights)
    planner = Planner(model, gpu_type(question.gpu), question.lanes or LANES)
    experts, coordinators = config.experts, config.coordinators.min_replicas
    if experts.tiers:
        raise ConfigError(f"models: {config.name!r}: experts.tiers: `manta plan` knows GPUs only, leave them out")
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


def checkpoint_of(path: str) -> Checkpoint:
    """Of a directory or an embedded model; an outline of a model of the hub that is known, or of a named shape."""
    if Path(path).expanduser().is_dir():
        return open_checkpoint(Path(path).expanduser())
    if path in EMBEDDED:
        return open_checkpoint(EMBEDDED[path])
    if path in KNOWN_MODELS:
        return outline(path, KNOWN_MODELS[path].architecture, KNOWN_MODELS[path].scheme)
    if path in NAMED_SHAPES:
        return outline(path, NAMED_SHAPES[path])
    known = ", ".join((*NAMED_SHAPES, *KNOWN_MODELS))
    raise ConfigError(f"{path!r} is no directory; shapes that are known by name: {known}")


def figures(question: Question, plan: Plan) -> tuple[Figure, ...]:
    """What the plan is made of, beside the data sheet."""
    lanes: Iterable[Figure] = () if plan.layout.local else (*(OF_LANES if question.lanes is None else ()), *OF_COPIES)
    return (*OF_GPUS, *lanes)


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
