"""Plots of settings, also of those where nobody serves in time: their scales were logarithms of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.commands.simulate.plot import draw_break_even


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_settings_are_drawn(tmp_path: Path, ratio: float | None) -> None:
    cells: list[dict[str, Any]] = [
        {"rate": rate, "skew": 0.0, "prompt": prompt, "ratio": ratio} for rate in (1.0, 4.0) for prompt in (256, 8192)
    ]
    file = tmp_path / "settings.svg"
    draw_break_even({"model": "mix", "gpu": "H100", "cells": cells}, file)
    assert b"prompts of 8192" in file.read_bytes()
