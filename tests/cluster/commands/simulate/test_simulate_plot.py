"""Plots, also of settings where nobody serves in time, and of a trace that ends before requests are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.commands.simulate.plot import draw, draw_break_even


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_settings_are_drawn(tmp_path: Path, ratio: float | None) -> None:
    """Their scales were logarithms of nothing."""
    cells: list[dict[str, Any]] = [
        {"rate": rate, "skew": 0.0, "prompt": prompt, "ratio": ratio} for rate in (1.0, 4.0) for prompt in (256, 8192)
    ]
    file = tmp_path / "settings.svg"
    draw_break_even({"model": "mix", "gpu": "H100", "cells": cells}, file)
    assert b"prompts of 8192" in file.read_bytes()


def test_of_a_way_in_which_nobody_was_counted_no_share_is_told(tmp_path: Path) -> None:
    """Its bar said "0.0 % good". Where (c) is not among them, its panel has no legend: there was a warning."""
    variants: list[dict[str, Any]] = [
        {"variant": name, "over_time": [], "gpu_s_per_1000_good_tokens": cost, "good_share": share}
        for name, cost, share in (("whole", None, None), ("together", None, 0.0), ("tiers", 2.0, 0.984))
    ]
    file = tmp_path / "fleets.svg"
    draw({"model": "mix", "gpu": "H100", "popularity": "uniform", "variants": variants}, file)
    told = file.read_text()
    assert [told.count(label) for label in ("no requests", "counted", "0.0 %", "98.4 %")] == [1, 1, 1, 1]
