"""Draws a plan as tables and a few sentences. Decides nothing."""

from __future__ import annotations

from math import inf

from rich.console import Console
from rich.table import Table

from cluster.planning.placement import gib
from cluster.planning.plan import USABLE, Plan, Planner, Target


def draw(name: str, target: Target, planner: Planner, plan: Plan, console: Console) -> None:
    """Processes, expectation, comparison."""
    gpu, load = planner.gpu, target.load
    console.print(
        f"[bold]{name}[/bold], {planner.model.dtype}, for {load.sequences:g} sequences of {load.context} tokens on "
        f"{plan.layout.gpus} × {gpu.name} ({gib(USABLE * gpu.memory_bytes)} of each to use)\n"
    )
    console.print(_processes(plan))
    console.print(_expectation(target, plan))
    console.print(_comparison(plan))
    console.print(_verdict(plan))


def _processes(plan: Plan) -> Table:
    table = Table("GPU", "process", "experts")
    for column in ("weights", "KV cache", "together"):
        table.add_column(column, justify="right")
    experts = {f"expert-{group.index}": ", ".join(map(str, group.experts)) for group in plan.layout.groups}
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
    lines.append(
        f"Expected: {_ms(plan.step_s)} a token for all, {target.load.sequences / plan.step_s:.0f} tokens a second; "
        f"attention {_ms(plan.attention_s)}, the slowest shard {_ms(plan.experts_s)}."
    )
    if target.step_s != inf and not plan.meets_target:
        lines.append(f"No layout makes a token in {_ms(target.step_s)}; this one is the nearest.")
    return "\n".join(lines) + "\n"


def _plural(plan: Plan) -> str:
    if not plan.layout.shared:
        return ""
    return "coordinator " if plan.layout.coordinators == 1 else "coordinators "


def _comparison(plan: Plan) -> Table:
    table = Table(title=f"Against fat replicas of {plan.replica_gpus} GPU(s), on as many GPUs", title_justify="left")
    for column in ("sequences", "ms a token", "tokens/s/GPU", "replica: ms", "replica: tokens/s/GPU"):
        table.add_column(column, justify="right")
    for one in plan.comparisons:
        if one.step_s is None and one.replica_step_s is None:
            continue
        numbers = (one.tokens_per_gpu, one.replica_tokens_per_gpu)
        own, rival = ("" if number is None else f"{number:.0f}" for number in numbers)
        table.add_row(str(one.sequences), _ms(one.step_s), own, _ms(one.replica_step_s), rival)
    return table


def _verdict(plan: Plan) -> str:
    if plan.loses_until is None:
        return "Splitting attention from experts never makes fewer tokens per GPU here."
    fits = [one.sequences for one in plan.comparisons if one.tokens_per_gpu is not None]
    if plan.loses_until >= max(fits, default=0):
        return "Fat replicas make more tokens per GPU at every number of sequences that fits."
    return f"Up to {plan.loses_until} sequences fat replicas make more tokens per GPU."


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"
