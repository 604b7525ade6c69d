"""Draws simulated fleets into a PNG or an SVG. Decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.commands.simulate.tables import LETTERS
from cluster.errors import ConfigError

COLOURS = {"whole": "#333333", "together": "#1f77b4", "single": "#d62728", "tiers": "#2ca02c"}
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "png": {"Software": None}}  # the same bytes each time


def draw(document: dict[str, Any], file: Path) -> None:
    """GPUs over time, replicas of (c) over time, and what a good token costs. Raises ConfigError."""
    figure, panels = _figure(3, f"{document['model']} on {document['gpu']}, popularity {document['popularity']}")
    held, replicas, cost = panels
    for one in document["variants"]:
        hours = [sample["at_s"] / 3600 for sample in one["over_time"]]
        held.step(
            hours, [sample["gpus"] for sample in one["over_time"]], where="post", label=LETTERS[one["variant"]],
            color=COLOURS[one["variant"]], linewidth=1,
        )  # fmt: skip
        if one["variant"] == "single":
            for index, name in enumerate(one["shards"]):
                numbers = [sample["replicas"][index] for sample in one["over_time"]]
                replicas.step(hours, numbers, where="post", label=name, linewidth=1)
            replicas.step(
                hours, [sample["coordinators"] for sample in one["over_time"]], where="post", label="coordinator",
                color="#333333", linewidth=1, linestyle="--",
            )  # fmt: skip
            replicas.legend(fontsize=6, ncols=2)
    held.set(xlabel="hour", ylabel="GPUs", ylim=(0, None))
    held.legend(fontsize=7)
    replicas.set(xlabel="hour", ylabel="replicas of (c)", ylim=(0, None))
    names = [one["variant"] for one in document["variants"]]
    costs = [one["gpu_s_per_1000_good_tokens"] or 0.0 for one in document["variants"]]
    bars = cost.bar([LETTERS[name].split(" ", 1)[0] for name in names], costs, color=[COLOURS[name] for name in names])
    cost.bar_label(bars, [_good(one["good_share"]) for one in document["variants"]], fontsize=7)
    cost.set(ylabel="GPU-seconds per 1,000 good tokens")
    cost.margins(y=0.2)
    _save(figure, file)


def draw_break_even(document: dict[str, Any], file: Path) -> None:
    """What (c) takes, as a share of (a), over load, a panel for each length of prompts. Raises ConfigError."""
    prompts = sorted({cell["prompt"] for cell in document["cells"]})
    figure, panels = _figure(
        len(prompts), f"{document['model']} on {document['gpu']}: GPU time of (c) over that of (a)"
    )
    for panel, prompt in zip(panels, prompts, strict=True):
        of_prompt = [cell for cell in document["cells"] if cell["prompt"] == prompt]
        for skew in sorted({cell["skew"] for cell in of_prompt}):
            points = [(cell["rate"], cell["ratio"]) for cell in of_prompt if cell["skew"] == skew and cell["ratio"]]
            panel.plot(
                [rate for rate, _ in points], [ratio for _, ratio in points], marker="o", markersize=3, linewidth=1,
                label=f"zipf {skew:g}",
            )  # fmt: skip
        panel.axhline(1.0, color="#333333", linewidth=0.8, linestyle="--")
        panel.set(xlabel="requests a second", title=f"prompts of {prompt}")
        if any(cell["ratio"] for cell in of_prompt):
            panel.set(xscale="log", yscale="log")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("below 1: scaling experts one by one pays")
    _save(figure, file)


def _good(share: float | None) -> str:
    return "no requests\ncounted" if share is None else f"{100 * share:.1f} %\ngood"


def _figure(panels: int, title: str) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "manta"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(3.6 * panels, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, file: Path) -> None:
    format_ = file.suffix.removeprefix(".").lower() or "png"
    if format_ not in METADATA:
        raise ConfigError(f"--plot: {file}: expected a name that ends in .png or .svg")
    try:
        figure.savefig(file, dpi=110, format=format_, metadata=METADATA[format_])
    except OSError as error:
        raise ConfigError(f"--plot: {file} cannot be written: {error}") from error
