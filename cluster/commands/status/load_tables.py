"""Draws ModelLoads for a terminal. Collects nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.commands.status.model_load import ExpertLoad, ModelLoad
from cluster.commands.status.tables import MOST_EXPERTS

BAR_WIDTH = 24  # cells of the busiest expert's bar
HOT, WARM = 0.9, 0.6  # busy fractions


def draw_load(loads: Sequence[ModelLoad]) -> RenderableType:
    """Each model's queue and rates, and below them its experts."""
    if not loads:
        return Text("No model is served here.", style="yellow")
    parts: list[RenderableType] = []
    for load in loads:
        title = Text(f"{load.model}", style="bold")
        title.append(
            f"  {load.running} running · {load.waiting} waiting · KV {load.kv_usage:.0%} · "
            f"{load.prompt_tokens_per_s:.0f} prompt tokens/s · {load.tokens_per_s:.1f} tokens/s",
            style="not bold",
        )
        parts += [title, _experts(load.experts) if load.experts else Text("a dense model", style="dim"), Text()]
    return Group(*parts)


def _experts(experts: Sequence[ExpertLoad]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("expert", "group", "rows/s", "", "busy", "queue", "rows"):
        table.add_column(column, justify="left" if column in ("expert", "") else "right", no_wrap=True)
    busiest = max(expert.rows_per_s for expert in experts)
    shown = experts if len(experts) <= MOST_EXPERTS else sorted(experts, key=lambda one: -one.rows_per_s)
    for one in shown[:MOST_EXPERTS]:
        cells = round(BAR_WIDTH * one.rows_per_s / busiest) if busiest else 0
        table.add_row(
            str(one.expert),
            str(one.group),
            f"{one.rows_per_s:.0f}",
            Text("█" * cells + "·" * (BAR_WIDTH - cells), style="cyan"),
            _busy(one.busy_fraction),
            "-" if one.queue_s is None else f"{1000 * one.queue_s:.1f} ms",
            str(one.rows),
        )
    if others := shown[MOST_EXPERTS:]:
        rate, rows = sum(one.rows_per_s for one in others), sum(one.rows for one in others)
        table.add_row(f"{len(others)} others", "", f"{rate:.0f}", "", "", "", str(rows))
    return table


def _busy(fraction: float | None) -> Text:
    if fraction is None:
        return Text("-")
    return Text(f"{fraction:.0%}", style="red" if fraction >= HOT else "yellow" if fraction >= WARM else "green")
