"""Draws the outcomes of `manta bench serve` into a PNG: how latencies are distributed, and tokens over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.commands.bench.serve.figures import Outcome
from cluster.errors import ConfigError

BINS = 40


def check_plotting() -> None:
    """Raises ConfigError before anything is measured when it could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'manta-serve[bench]'") from error


def draw(outcomes: Sequence[Outcome], title: str, file: Path) -> None:
    """Four panels. Raises ConfigError when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    answered = [outcome for outcome in outcomes if outcome.error is None]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(2, 2)
    series = {
        "time to first token (ms)": [o.ttft_ms for o in answered],
        "time per later token (ms)": [o.tpot_ms for o in answered if o.tpot_ms is not None],
        "gap between two pieces (ms)": [gap for o in answered for gap in o.gaps_ms],
    }
    for panel, (name, values) in zip(panels.flat, series.items(), strict=False):
        if values:
            panel.ecdf(values)
        panel.set(xlabel=name, ylabel="share", xlim=(0, None), ylim=(0, 1))
        panel.grid(alpha=0.3)
    over_time = panels[1, 1]
    moments = [t for o in answered for t in o.token_times_s]
    weights = [o.output_tokens / len(o.token_times_s) for o in answered for _ in o.token_times_s]
    end = max((o.end_s for o in outcomes), default=1.0)
    over_time.hist(moments, bins=BINS, range=(0, end), weights=[w * BINS / end for w in weights])
    for outcome in outcomes:
        if outcome.error is not None:
            over_time.axvline(outcome.end_s, color="red", alpha=0.5)
    over_time.set(xlabel="seconds; failed requests in red", ylabel="output tokens a second")
    over_time.grid(alpha=0.3)
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
