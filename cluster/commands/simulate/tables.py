"""Draws simulated fleets as tables and a few sentences. Decides nothing."""

from __future__ import annotations

from typing import Any

from cluster.commands.bench.output import Output

LETTERS = {
    "whole": "(a) whole model",
    "together": "(b) experts together",
    "single": "(c) one by one",
    "tiers": "(d) tiers",
}
ROWS = 12  # of replicas over time
COSTS = (
    "", "batch", "GPU-hours", "at most", "fixed at that", "CPU machines", "good", "good tokens/s", "GPU-s per 1,000",
    "shed", "failed",
)  # fmt: skip


def draw(document: dict[str, Any], output: Output) -> None:
    """Of all variants."""
    objective = document["objective"]
    output.line(
        f"{document['model']} on {document['gpu']}: {document['requests']} requests in {document['hours']:.1f} hours, "
        f"popularity {document['popularity']}, seed {document['seed']}. Good: the first token within "
        f"{objective['first_token_s']:g} s, later ones within {1e3 * objective['token_s']:g} ms on average."
    )
    variants = document["variants"]
    output.table(
        "What it costs, and who is served in time",
        COSTS,
        (
            (
                LETTERS[one["variant"]],
                str(one["max_num_seqs"]),
                f"{one['gpu_hours']:.1f}",
                f"{one['peak_gpus']:g}",
                f"{one['gpu_hours_if_fixed_at_peak']:.1f}",
                f"{one['cpu_machine_hours']:.1f} h" if one["cpu_machine_hours"] else "",
                _share(one["good_share"]),
                "–" if one["goodput_tokens_per_s"] is None else f"{one['goodput_tokens_per_s']:.0f}",
                "–" if one["gpu_s_per_1000_good_tokens"] is None else f"{one['gpu_s_per_1000_good_tokens']:.2f}",
                str(one["shed"]),
                str(one["failed"]),
            )
            for one in variants
        ),
    )  # fmt: skip
    if not any(one["requests"] for one in variants):
        output.line(
            f"Nobody arrives after the warm-up of {objective['warm_up_s']:g} s, so nobody is counted: "
            "--warm-up 0 counts everybody."
        )
    output.table(
        "How long it takes",
        ("", "first token p50", "p99", "later token p50", "p99"),
        (
            (
                LETTERS[one["variant"]],
                *(_seconds(one["first_token_s"][part]) for part in ("p50", "p99")),
                *(_milliseconds(one["token_s"][part]) for part in ("p50", "p99")),
            )
            for one in variants
        ),
    )
    for one in variants:
        names = one["shards"][:1] and ["each group"] if one["variant"] == "together" else one["shards"]
        samples = one["over_time"][:: max(1, len(one["over_time"]) // ROWS)]
        output.table(
            f"{LETTERS[one['variant']]}: replicas over time",
            ("hour", "coordinators", *names, "GPUs", "run", "wait"),
            (
                (
                    f"{sample['at_s'] / 3600:.1f}",
                    *map(str, (sample["coordinators"], *sample["replicas"][: len(names)])),
                    f"{sample['gpus']:g}",
                    str(sample["running"]),
                    str(sample["waiting"]),
                )
                for sample in samples
            ),
        )
    output.line(verdict(variants))
    for name, why in document["does_not_fit"].items():
        output.line(f"{LETTERS[name]} does not fit: {why}")
    _figures(document, output)


def verdict(variants: list[dict[str, Any]]) -> str:
    """Which costs least for each good token."""
    able = [one for one in variants if one["gpu_s_per_1000_good_tokens"] is not None]
    if not able:
        return "None of them answers anybody in time."
    best = min(able, key=lambda one: one["gpu_s_per_1000_good_tokens"])
    others = ", ".join(
        f"{LETTERS[one['variant']]} {one['gpu_s_per_1000_good_tokens'] / best['gpu_s_per_1000_good_tokens']:.2f}"
        for one in able
        if one is not best
    )
    return f"Least GPU time for a good token: {LETTERS[best['variant']]}." + (
        f" Times as much: {others}." if others else ""
    )


def draw_break_even(document: dict[str, Any], output: Output) -> None:
    """A row for each setting."""
    output.line(
        f"{document['model']} on {document['gpu']}: GPU-seconds for 1,000 good tokens, – where nobody is served in time"
    )
    output.table(
        "At an even load",
        ("requests/s", "skew", "prompt", *(LETTERS[name] for name in ("whole", "single")), "least"),
        (
            (
                f"{cell['rate']:g}",
                f"{cell['skew']:g}",
                str(cell["prompt"]),
                *(_cost(cell["variants"][name]) for name in ("whole", "single")),
                LETTERS[cell["least"]] if cell["least"] else "–",
            )
            for cell in document["cells"]
        ),
    )
    output.line("In brackets: the share of requests that are good, where it is below 99 %.")
    _figures(document, output)


def _cost(variant: dict[str, Any] | None) -> str:
    if variant is None or variant["gpu_s_per_1000_good_tokens"] is None:
        return "–"
    share = variant["good_share"]
    return f"{variant['gpu_s_per_1000_good_tokens']:.2f}" + (f" ({_share(share)})" if share < 0.99 else "")


def _figures(document: dict[str, Any], output: Output) -> None:
    for title, measured in (("Measured", True), ("Assumed", False)):
        lines = [f"{one['what']} ({one['source']})" for one in document["figures"] if one["measured"] is measured]
        if lines:
            output.line(f"{title}: {'; '.join(lines)}.")


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.2f} s"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f} ms"
