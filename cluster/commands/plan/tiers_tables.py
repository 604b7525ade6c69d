"""Shows a plan with experts on GPUs and CPUs: as tables and sentences, as JSON, and as a configuration to paste."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.commands.plan.tables import draw_figures
from cluster.commands.plan.tiers import TieredPlan
from cluster.config import ModelConfig
from cluster.planning.costs import Figure
from cluster.planning.placement import gib, told
from cluster.planning.tiers import Shard


def draw(planned: TieredPlan, figures: Sequence[Figure], console: Console) -> None:
    """What is where, how hot it is, how fast it may be, and the configuration."""
    machine, load = planned.machine, planned.load
    memory = "" if machine.ram_bytes is None else f"{gib(machine.ram_bytes)} of memory"
    where = f"{machine.cards} × {machine.card.name} of {gib(machine.card.memory_bytes)}" + (memory and f" and {memory}")
    if not machine.cards:
        where = f"CPUs with {memory}"
    sequences = "sequence" if load.sequences == 1 else "sequences"
    console.print(
        f"[bold]{planned.config.name}[/bold], {planned.tiered.model.dtype}, for {load.sequences:g} {sequences} of "
        f"{load.context} tokens on {where}\n"
    )
    console.print(_processes(planned))
    if machine.cards:
        console.print(_use(planned))
    console.print(_expectation(planned))
    if planned.others:
        console.print(_others(planned))
    draw_figures(figures, console)
    if planned.proposed:
        print(f"\n# The configuration, for manta serve --config\n{config_text(planned.config)}", end="")


def document(planned: TieredPlan, figures: Sequence[Figure]) -> dict[str, Any]:
    """As JSON: bytes, seconds, and the configuration."""
    a = planned.tiered.model.architecture
    return {
        "model": planned.config.name,
        "config": config_document(planned.config),
        "machine": {
            "card": planned.machine.card.name,
            "cards": planned.machine.cards,
            "card_bytes": planned.machine.card.memory_bytes,
            "ram_bytes": planned.machine.ram_bytes,
        },
        "coordinator": {
            "weight_bytes": planned.coordinator_bytes,
            "cache_bytes": planned.cache_bytes,
            "step_bytes": planned.step_bytes,
        },
        "shards": [
            {
                "name": shard.name,
                "device": shard.device,
                "experts": list(shard.experts),
                "bits": shard.bits,
                "weight_bytes": len(shard.experts) * shard.expert_bytes,
            }
            for shard in planned.tiered.shards
            if not planned.local
        ],
        "observed": None if planned.observed is None else list(planned.observed.rows),
        "chances": list(planned.tiered.chances)[: a.num_experts],
        "step_s": planned.times.all_s,
        "attention_s": planned.times.attention_s,
        "gpu_s": planned.times.gpu_s,
        "cpu_s": planned.times.cpu_s,
        "wire_s": planned.times.wire_s,
        "host_s": planned.times.host_s,
        "first_token_s": planned.first_token_s,
        "others": [
            {"gpu": split.gpu_format, "cpu": split.cpu_format, "step_s": times.all_s} for split, times in planned.others
        ],
        "figures": [one.document() for one in figures],
    }


def config_document(config: ModelConfig) -> dict[str, Any]:
    """What a file has to say for it."""
    return {"models": [config.model_dump(mode="json", exclude_unset=True)]}


def config_text(config: ModelConfig) -> str:
    """The same, as YAML."""
    return yaml.safe_dump(config_document(config), sort_keys=False, default_flow_style=None, width=110)


def _processes(planned: TieredPlan) -> Table:
    table = Table("on", "process", "experts", "numbers")
    for column in ("weights", "KV cache", "steps"):
        table.add_column(column, justify="right")
    coordinator = "GPU" if planned.tiered.on_gpu else "CPU"
    sizes = (gib(planned.coordinator_bytes), gib(planned.cache_bytes), gib(planned.step_bytes))
    table.add_row(coordinator, "coordinator", "all" if planned.local else "", planned.tiered.model.dtype, *sizes)
    total = {coordinator: planned.coordinator_bytes + planned.cache_bytes + planned.step_bytes}
    for shard in () if planned.local else planned.tiered.shards:
        on = "GPU" if shard.device == "cuda" else "CPU"
        size = len(shard.experts) * shard.expert_bytes
        total[on] = total.get(on, 0) + size
        table.add_row(on, shard.name, told(shard.experts), _numbers(shard, planned), gib(size), "", "")
    table.add_section()
    machine = planned.machine
    usable = {"GPU": sum(machine.node.gpu_memory_bytes), "CPU": machine.node.memory_bytes}
    for on, size in total.items():
        of = f"of {gib(usable[on])} to use" if on == "GPU" or machine.ram_bytes is not None else ""
        table.add_row(on, "together", "", of, gib(size), "", "")
    return table


def _numbers(shard: Shard, planned: TieredPlan) -> str:
    [one] = [one for one in planned.plan.experts if one.name == shard.name]
    held = {32: "float32", 16: "bfloat16"}.get(shard.bits)
    if one.rounding is not None:
        return str(one.rounding) if held is None else f"{one.rounding}, held in {held}"
    return held or f"{shard.bits} bits, as stored"


def _use(planned: TieredPlan) -> str:
    if planned.observed is None:
        return "No --observed: all experts are taken to be asked for alike, so it says nothing of which are on the GPU."
    rows = planned.observed.rows
    hottest = sorted(range(len(rows)), key=lambda expert: -rows[expert])
    shares = ", ".join(f"{expert}: {100 * rows[expert] / sum(rows):.0f} %" for expert in hottest)
    return f"Rows of each expert, as observed of {planned.observed.model!r}: {shares}."


def _expectation(planned: TieredPlan) -> str:
    times, load = planned.times, planned.load
    wire = "" if planned.local else f", rows on their way {_ms(times.wire_s)}"
    sides = [
        f"experts on {on} {_ms(seconds)}" for on, seconds in (("GPUs", times.gpu_s), ("CPUs", times.cpu_s)) if seconds
    ]
    experts = f", {' and at the same time '.join(sides)}" if sides else ""  # a dense model has none
    return (
        f"Expected: {_ms(times.all_s)} a token for all, {load.sequences / times.all_s:.1f} tokens a second; attention "
        f"{_ms(times.attention_s)}{experts}{wire}, "
        f"Python and launches {_ms(times.host_s)}{'' if times.waits else ' meanwhile'}.\n"
        f"First token of a prompt of {load.context} tokens: {planned.first_token_s:.1f} s, when nothing else runs.\n"
    )


def _others(planned: TieredPlan) -> Table:
    title = "What fits as well, at less quality"
    columns = ("experts on the GPU", "on CPUs") if planned.machine.cards else ("numbers",)
    table = Table(*columns, title=title, title_justify="left")
    table.add_column("ms a token", justify="right")
    for split, times in planned.others:
        if not planned.machine.cards:
            table.add_row(_format(split.cpu_format), _ms(times.all_s))
            continue
        number = sum(map(len, split.on_gpus))
        cpus = f"{len(split.on_cpus)}, {_format(split.cpu_format)}" if split.on_cpus else "none"
        table.add_row(f"{number}, {_format(split.gpu_format)}", cpus, _ms(times.all_s))
    return table


def _format(name: str) -> str:
    return "not rounded" if name == "none" else name


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
