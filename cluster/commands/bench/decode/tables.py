"""Draws the results of `manta bench decode`, as they stand in its JSON line. Measures nothing."""

from __future__ import annotations

from typing import Any

from cluster.commands.bench.output import Output

Rows = list[dict[str, Any]]


def draw_decode(rows: Rows, output: Output, *, compared: bool) -> None:
    """A line for each batch size."""
    columns = ["batch", "ms/step", "tokens/s", "MB/step", "floor ms", "of the floor"]
    cells = [
        [
            f"{row['batch']}",
            f"{row['ms_per_step']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_per_step'] / 1e6:.0f}",
            f"{row['floor_ms']:.2f}",
            f"{row['floor_fraction']:.2f}",
        ]
        for row in rows
    ]
    if compared:
        columns += ["transformers", "speed-up", "its experts, attention", "same tokens"]
        for row, line in zip(rows, cells, strict=True):
            line += [
                f"{row['transformers_ms_per_step']:.2f}",
                f"{row['speedup']:.2f}×",
                f"{row['transformers_experts']}, {row['transformers_attention']}",
                f"{100 * row['equal_tokens']:.0f} %",
            ]
    output.table("decode", columns, cells)


def draw_prefill(rows: Rows, output: Output, *, compared: bool) -> None:
    """A line for each set of prompts."""
    columns = ["prompts", "ms", "tokens/s"]
    cells = [
        [f"{row['sequences']} × {row['prompt_tokens']}", f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
        for row in rows
    ]
    if compared:
        columns += ["transformers", "speed-up", "its experts, attention"]
        for row, line in zip(rows, cells, strict=True):
            line += [
                f"{row['transformers_ms']:.1f}",
                f"{row['speedup']:.2f}×",
                f"{row['transformers_experts']}, {row['transformers_attention']}",
            ]
    output.table("prefill", columns, cells)
