"""Draws the results of `manta bench decode`, as they stand in its JSON line. Measures nothing."""

from __future__ import annotations

from typing import Any

from cluster.commands.bench.output import Output

Rows = list[dict[str, Any]]


def draw_decode(rows: Rows, output: Output) -> None:
    """A line for each batch and length, and one below it for each rival."""
    columns = [
        "weights",
        "batch",
        "tokens before",
        "ms/step",
        "tokens/s",
        "MB/step",
        "of it KV",
        "floor ms",
        "of the floor",
    ]
    cells = [
        [
            row["weights"],
            f"{row['batch']}",
            f"{row['context'] or row['prompt_tokens']}",
            f"{row['ms_per_step']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_per_step'] / 1e6:.0f}",
            f"{row['kv_bytes_per_step'] / 1e6:.1f}",
            f"{row['floor_ms']:.2f}",
            f"{row['floor_fraction']:.2f}",
        ]
        for row in rows
    ]
    output.table("decode", columns, cells)
    _draw_rivals(
        "decode, the others",
        [
            (_workload(row, row["batch"], row["context"] or row["prompt_tokens"]), rival, f"{rival['ms_per_step']:.2f}")
            for row in rows
            for rival in row["rivals"]
        ],
        output,
    )


def draw_prefill(rows: Rows, output: Output) -> None:
    """A line for each set of prompts."""
    columns = ["weights", "prompts", "ms", "tokens/s", "weights MB", "KV MB", "peak MB", "grown by MB"]
    cells = [
        [
            row["weights"],
            f"{row['sequences']} × {row['prompt_tokens']}",
            f"{row['ms']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            *(_megabytes(row[f"{what}_bytes"]) for what in ("weight", "kv", "peak", "grown")),
        ]
        for row in rows
    ]
    output.table("prefill", columns, cells)
    _draw_rivals(
        "prefill, the others",
        [
            (_workload(row, row["sequences"], row["prompt_tokens"]), rival, f"{rival['ms']:.1f}")
            for row in rows
            for rival in row["rivals"]
        ],
        output,
    )


def _draw_rivals(title: str, rows: list[tuple[str, dict[str, Any], str]], output: Output) -> None:
    """`rows`: the workload, the rival's figures, its milliseconds."""
    if not rows:
        return
    columns = ["", "engine", "ms", "speed-up", "its implementation", "same tokens", "peak MB", "grown by MB"]
    cells = []
    for workload, rival, ms in rows:
        same = rival.get("equal_tokens")
        cells.append(
            [
                workload,
                rival["name"],
                ms,
                f"{rival['speedup']:.2f}×",
                rival["implementation"],
                "-" if same is None else f"{100 * same:.0f} %",
                _megabytes(rival.get("peak_bytes")),
                _megabytes(rival.get("grown_bytes")),
            ]
        )
    output.table(title, columns, cells)


def _workload(row: dict[str, Any], sequences: int, tokens: int) -> str:
    return f"{row['weights']}, {sequences} × {tokens}"


def _megabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.0f}"
