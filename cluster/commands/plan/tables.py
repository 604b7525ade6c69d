"""Draws a plan as tables and a few sentences. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from rich.console import Console
from rich.table import Table

from cluster.planning.costs import Figure
from cluster.planning.placement import gib, told
from cluster.planning.plan import Plan, Planner, Target


def draw(name: str, target: Target, planner: Planner, plan: Plan, console: Console) -> None:
    """Processes, expectation, comparison."""
    gpu, load = planner.gpu, target.load
    console.print(
        f"[bold]{name}[/bold], {planner.model.dtype}, for {load.sequences:g} sequences of {load.context} tokens on "
        f"{plan.layout.gpus} × {gpu.name} ({gib(planner.usable_bytes)} of each to use)\n"
    )
    if plan.rival_gpus > 1:
        console.print(f"One {gpu.name} does not hold the whole model. {planner.what_holds_it(load.context)}.\n")
    console.print(_processes(plan))
    console.print(_expectation(target, plan))
    if plan.rival is not None:
        console.print(_comparison(plan))
        console.print(_verdict(plan))
    if plan.layout.groups:
        console.print(
            "What a day of requests costs, with replicas that follow it: manta simulate (docs/does-it-pay.md)."
        )


def draw_figures(figures: Sequence[Figure], console: Console) -> None:
    """What was measured, and what is assumed."""
    for title, measured in (
        ("Measured (headings are of docs/benchmarks.md: 2 CPU cores, or one H100)", True),
        ("Assumed", False),
    ):
        lines = [f"{one.what} ({one.source})" for one in figures if one.measured is measured]
        if lines:
            console.print(f"{title}: {'; '.join(lines)}.")


def _processes(plan: Plan) -> Table:
    table = Table("GPU", "process", "experts")
    for column in ("weights", "KV cache", "together"):
        table.add_column(column, justify="right")
    experts = {f"expert-{group.index}": told(group.experts) for group in plan.layout.groups}
    for one in sorted(plan.processes, key=lambda process: process.gpu):
        sizes = (one.weight_bytes, one.cache_bytes, one.weight_bytes + one.cache_bytes)
        table.add_row(str(one.gpu), one.name, experts.get(one.name, ""), *(gib(size) if size else "" for size in sizes))
    return table


def _expectation(target: Target, plan: Plan) -> str:
    lines = []
    if plan.layout.groups:
        ratio = plan.attention_per_expert_gpu
        where = "on the GPUs of the experts" if plan.layout.shared else "GPUs for attention for each with experts"
        lines.append(f"{plan.layout.coordinators if plan.layout.shared else f'{ratio:.2f}'} {_plural(plan)}{where}")
    lines.append(f"Floor: {_ms(plan.floor_s)} a token for one sequence, by the memory's bandwidth alone.")
    wire = "" if plan.layout.local else f", rows on their way {_ms(plan.wire_s)}"
    name = "experts" if plan.layout.local else "the slowest shard"
    experts = f", {name} {_ms(plan.experts_s)}" if plan.experts_s else ""
    lines.append(
        f"Expected: {_ms(plan.step_s)} a token for all, {target.load.sequences / plan.step_s:.0f} tokens a second; "
        f"attention {_ms(plan.attention_s)}{experts}{wire}, Python and launches {_ms(plan.host_s)}"
        f"{' meanwhile' if plan.layout.local else ''}."
    )
    lines.append(
        f"First token of a prompt of {target.load.context} tokens: {_ms(plan.first_token_s)}, when nothing else runs."
    )
    if target.step_s != inf and not plan.meets_target:
        lines.append(f"No layout makes a token in {_ms(target.step_s)}; this one is the nearest.")
    return "\n".join(lines) + "\n"


def _plural(plan: Plan) -> str:
    if not plan.layout.shared:
        return ""
    return "coordinator " if plan.layout.coordinators == 1 else "coordinators "


def _rival(plan: Plan) -> str:
    if plan.rival == "local":
        return "local coordinators, each with all experts on its GPU (experts.transport: local)"
    return f"tensor parallelism over {plan.rival_gpus} GPUs, as vLLM and SGLang have it and Manta does not"


def _comparison(plan: Plan) -> Table:
    table = Table(title=f"Against {_rival(plan)}, on as many GPUs", title_justify="left")
    for column in ("sequences", "ms a token", "tokens/s/GPU", "the other: ms", "the other: tokens/s/GPU"):
        table.add_column(column, justify="right")
    for one in plan.comparisons:
        if one.step_s is None and one.rival_step_s is None:
            continue
        numbers = (one.tokens_per_gpu, one.rival_tokens_per_gpu)
        own, rival = ("" if number is None else f"{number:.0f}" for number in numbers)
        table.add_row(str(one.sequences), _ms(one.step_s), own, _ms(one.rival_step_s), rival)
    return table


def _verdict(plan: Plan) -> str:
    name = "Local coordinators" if plan.rival == "local" else "Tensor parallelism"
    if not plan.loses_at:
        return "Splitting attention from experts never makes fewer tokens per GPU here."
    if set(plan.loses_at) >= {one.sequences for one in plan.comparisons if one.tokens_per_gpu is not None}:
        return f"{name} would make more tokens per GPU at every number of sequences that fits."
    return f"{name} would make more tokens per GPU for {', '.join(map(str, plan.loses_at))} sequences."


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"
