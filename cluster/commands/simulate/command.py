"""`manta simulate`: what a fleet would do with a trace, served in each of the ways there are. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.commands.bench.output import Output
from cluster.commands.bench.serve.plot import check_plotting
from cluster.commands.plan.command import DEFAULT_GPU, HUB_IDS, checkpoint_of
from cluster.commands.plan.observed import observe
from cluster.commands.simulate import tables
from cluster.config import ModelConfig, load_config, parse_config
from cluster.errors import ConfigError, DoesNotFit
from cluster.planning.costs import ASSUMED, CORE_FLOPS, CPU_BANDWIDTH, CPU_CORES, Costs, Figure
from cluster.planning.gpus import GpuType, gpu_type
from cluster.planning.profile import Profile, read_profile
from cluster.planning.tiers import Cpus
from cluster.simulation.fleet.break_even import Cell, Grid, cells
from cluster.simulation.fleet.fleet import Fleet, serve
from cluster.simulation.fleet.outcome import Objective
from cluster.simulation.fleet.popularity import Popularity
from cluster.simulation.fleet.step_costs import Hardware
from cluster.simulation.fleet.trace import Arrival, Synthetic, read_trace
from cluster.simulation.fleet.variants import NAMES, WHOLE, Options, Served, tuned

CPU = "CPU"  # --gpu: coordinators and shards are on CPUs
ASSUMED_OF_STARTS = "a replica starts in {process_s:g} s and loads {gb:g} GB/s (--start, --load-bandwidth)"


@dataclass(frozen=True)
class Question:
    """What the command was asked."""

    config: str
    model: str | None
    trace: Path | None
    synthetic: str | None
    scale: float
    popularity: str
    observed_token_file: Path | None
    objective: Objective
    gpu: str | None
    profile: Path | None
    cores: int | None
    quantization: str | None
    variants: tuple[str, ...]
    options: Options
    keep_batch: bool
    seed: int
    as_json: bool
    plot: Path | None
    break_even: bool


def run(question: Question) -> None:
    """Raises ConfigError, or DoesNotFit where not even one variant fits."""
    if question.plot is not None:
        check_plotting()
    config = _model_config(question)
    checkpoint = checkpoint_of(config.path, config.model_impl)
    profile = None if question.profile is None else read_profile(question.profile)
    hardware = _hardware(question, profile)
    a = checkpoint.architecture
    if question.popularity.startswith("http"):
        rows = observe(question.popularity, question.observed_token_file, config.name, a.num_experts).rows
        popularity = Popularity(a.num_expert_layers, a.num_experts, a.top_k, counted=rows)
    else:
        popularity = Popularity.parse(
            question.popularity, a.num_expert_layers, a.num_experts, max(1, a.top_k), question.seed
        )
    served = Served(config, checkpoint, hardware, popularity, question.options)
    figures = _figures(question, hardware, profile)
    output = Output()
    if question.break_even:
        _break_even(question, served, figures, output)
        return
    arrivals = _arrivals(question)
    documents: dict[str, dict[str, Any]] = {}
    unfit: dict[str, str] = {}
    for name in question.variants:
        try:
            fleet = fleet_of(served, name, question.objective)
        except DoesNotFit as error:
            unfit[name] = str(error)
            continue
        if not question.keep_batch:
            fleet = tuned(fleet, question.objective, arrivals)
        documents[name] = _described(fleet) | serve(fleet, arrivals, question.seed).document(question.objective)
    if not documents:
        raise DoesNotFit(next(iter(unfit.values())))
    document = {
        "model": config.name,
        "gpu": hardware.gpu.name,
        "seed": question.seed,
        "popularity": question.popularity,
        "objective": asdict(question.objective),
        "options": asdict(question.options),
        "requests": len(arrivals),
        "hours": arrivals[-1].at_s / 3600,
        "variants": list(documents.values()),
        "does_not_fit": unfit,
        "figures": [one.document() for one in figures],
    }
    if question.plot is not None:
        from cluster.commands.simulate import plot

        plot.draw(document, question.plot)
    if question.as_json:
        print(json.dumps(document, allow_nan=False))
        return
    tables.draw(document, output)


def fleet_of(served: Served, name: str, objective: Objective) -> Fleet:
    """Raises DoesNotFit."""
    return served.whole() if name == WHOLE else served.split(name, objective)


def _break_even(question: Question, served: Served, figures: Sequence[Figure], output: Output) -> None:
    synthetic = Synthetic.parse(question.synthetic or "")
    found: list[Cell] = []
    with output.progress() as progress:
        grid = Grid()
        task = progress.add_task("settings", total=grid.number)
        for cell in cells(served, synthetic, grid, question.objective, question.seed):
            found.append(cell)
            progress.advance(task)
    document = {
        "model": served.config.name,
        "gpu": served.hardware.gpu.name,
        "seed": question.seed,
        "objective": asdict(question.objective),
        "options": asdict(question.options),
        "cells": [cell.document() for cell in found],
        "figures": [one.document() for one in figures],
    }
    if question.plot is not None:
        from cluster.commands.simulate import plot

        plot.draw_break_even(document, question.plot)
    if question.as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        tables.draw_break_even(document, output)


def _described(fleet: Fleet) -> dict[str, Any]:
    return {
        "gpus_per_coordinator": fleet.gpus_per_coordinator,
        "kv_tokens": fleet.kv_tokens,
        "max_num_seqs": fleet.engine.max_num_seqs,
        "gpu_share_of_shards": {one.name: one.share for one in fleet.shards},
        "start_s": {"coordinator": fleet.coordinator_start_s} | {one.name: one.start_s for one in fleet.shards},
    }


def _model_config(question: Question) -> ModelConfig:
    file = Path(question.config)
    if file.is_file():
        models = load_config(file).models
        named = [one for one in models if question.model in (None, one.name)]
        if len(named) != 1:
            names = ", ".join(one.name for one in models)
            raise ConfigError(f"--model: {file} has {names}; name one of them")
        config = named[0]
    else:
        path = HUB_IDS.get(question.config, question.config)
        config = ModelConfig(name=question.config.rstrip("/").rsplit("/", 1)[-1], path=path)
    if question.quantization is None:
        return config
    document = config.model_dump(exclude_defaults=True)
    document["engine"] = document.get("engine", {}) | {"quantization": question.quantization}
    return parse_config({"models": [document]}, source="manta simulate").models[0]


def _hardware(question: Question, profile: Profile | None) -> Hardware:
    costs: Costs = ASSUMED if profile is None else profile.costs()
    bandwidth = (None if profile is None else profile.measured("cpu_bandwidth")) or CPU_BANDWIDTH
    cores = question.cores or int(CPU_CORES.value)
    cpus = Cpus(bandwidth.value, cores * CORE_FLOPS.value)
    if question.gpu is not None and question.gpu.upper() == CPU:
        return Hardware(GpuType(CPU, 2**50, cpus.bandwidth, cpus.flops), costs, cpus, costs.lanes, on_gpu=False)
    card = gpu_type(question.gpu) if question.gpu is not None else None if profile is None else profile.gpu
    return Hardware(card or gpu_type(DEFAULT_GPU), costs, cpus, costs.lanes)


def _figures(question: Question, hardware: Hardware, profile: Profile | None) -> tuple[Figure, ...]:
    costs, options = hardware.costs, question.options
    starts = ASSUMED_OF_STARTS.format(process_s=options.process_s, gb=options.load_bandwidth / 1e9)
    of_gpus = (*costs.of_gpus, *costs.of_steps, *costs.of_copies, costs.hop) if hardware.on_gpu else (costs.python,)
    bandwidth = (None if profile is None else profile.measured("cpu_bandwidth")) or CPU_BANDWIDTH
    return (*of_gpus, *costs.of_lanes, bandwidth, Figure(options.process_s, starts, False, "nobody measured it"))


def _arrivals(question: Question) -> list[Arrival]:
    if (question.trace is None) == (question.synthetic is None):
        raise ConfigError("give either --trace FILE or --synthetic, which may be empty: --synthetic ''")
    if question.trace is not None:
        return read_trace(question.trace, question.scale)
    synthetic = Synthetic.parse(question.synthetic or "")
    arrivals = replace(synthetic, rate=synthetic.rate * question.scale).arrivals(question.seed)
    if not arrivals:
        raise ConfigError("--synthetic: nobody arrives: more hours, or a higher rate")
    return arrivals


def chosen(variants: str) -> tuple[str, ...]:
    """`whole,single`. Raises ConfigError."""
    names = tuple(dict.fromkeys(part.strip() for part in variants.split(",") if part.strip()))
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--variants: {name!r} is unknown; known are {', '.join(NAMES)}")
    return names or NAMES
