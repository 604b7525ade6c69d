"""`manta plan`: which processes a model needs on GPUs of one type, and what they would do. Starts nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from cluster.checkpoint.architecture import Architecture, compute_dtype
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import EMBEDDED
from cluster.checkpoint.known_models import KNOWN_MODELS
from cluster.commands.bench.shapes import SHAPES
from cluster.config import ModelConfig, load_config
from cluster.errors import ConfigError
from cluster.planning.gpus import gpu_type
from cluster.planning.placement import ExpertGroup, plan_groups
from cluster.planning.plan import Layout, Plan, Planner, Target, group_list
from cluster.planning.roofline import Link, Model

# One layer's dispatch and combine over lanes, measured with 2 and with 8 groups on 2 CPU cores (README, Benchmarks).
DISPATCH_S, GROUP_S = 130e-6, 56e-6


@dataclass(frozen=True)
class Question:
    """What the command was asked."""

    gpu: str
    target: Target
    link: Link
    dtype: str = "auto"


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

    from cluster.commands.plan_tables import draw

    for config, planner, plan in plans:
        draw(config.name, question.target, planner, plan, Console(highlight=False))


def plan_one(config: ModelConfig, question: Question, *, chosen: bool) -> tuple[Planner, Plan]:
    """The best layout, or with `chosen` the one that the configuration says where it says one."""
    architecture = shape_of(config.path)
    setting = config.engine.dtype if question.dtype == "auto" else question.dtype
    dtype = compute_dtype(setting, architecture)  # type: ignore[arg-type]
    planner = Planner(Model(architecture, dtype), gpu_type(question.gpu), question.link)
    experts = config.experts
    if experts.tiers:
        raise ConfigError(f"models: {config.name!r}: experts.tiers: `manta plan` knows GPUs only, leave them out")
    if not chosen or experts.groups == "auto" or experts.transport == "local":
        return planner, planner.plan(question.target)
    groups: tuple[ExpertGroup, ...] = plan_groups(experts.groups, architecture.num_experts, 1, 1)
    shared = experts.gpus_per_shard is not None and experts.gpus_per_shard < 1
    layout = Layout(groups, config.coordinators.min_replicas, shared)
    return planner, planner.evaluate(layout, question.target)


def shape_of(path: str) -> Architecture:
    """Of a directory, an embedded model, a model of the hub that is known, or a named shape."""
    if Path(path).expanduser().is_dir():
        return open_checkpoint(Path(path).expanduser()).architecture
    if path in EMBEDDED:
        return open_checkpoint(EMBEDDED[path]).architecture
    shapes = {**SHAPES, **KNOWN_MODELS}
    try:
        return shapes[path]
    except KeyError:
        raise ConfigError(f"{path!r} is no directory; shapes that are known by name: {', '.join(shapes)}") from None


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
        "link": asdict(planner.link),
        "layout": {
            "groups": group_list(plan.layout.groups),
            "coordinators": plan.layout.coordinators,
            "shared": plan.layout.shared,
            "gpus": plan.layout.gpus,
        },
        "processes": [asdict(process) for process in plan.processes],
        "floor_s": plan.floor_s,
        "step_s": plan.step_s,
        "attention_s": plan.attention_s,
        "experts_s": plan.experts_s,
        "meets_target": plan.meets_target,
        "attention_per_expert_gpu": None if ratio == inf else ratio,
        "replica_gpus": plan.replica_gpus,
        "loses_until": plan.loses_until,
        "comparisons": [asdict(one) for one in plan.comparisons],
    }
