"""Which way costs least, over settings."""

from __future__ import annotations

from cluster.simulation.fleet.break_even import Cell, Grid, cells
from cluster.simulation.fleet.outcome import Objective
from cluster.simulation.fleet.trace import Synthetic
from tests.cluster.simulation.fleet.models import served

COSTS = {"good_share": 1.0, "gpu_s_per_1000_good_tokens": 2.0}


def test_each_setting_is_run_once_and_both_ways() -> None:
    grid = Grid(rates=(0.5, 1.0), skews=(0.0, 1.4), prompts=(100,), hours=0.02)
    found = list(cells(served(), Synthetic(rate=4.0, output=30.0), grid, Objective(2.0, 0.1), 1))
    assert [(cell.rate, cell.skew, cell.prompt) for cell in found] == [
        (2.0, 0.0, 100), (2.0, 1.4, 100), (4.0, 0.0, 100), (4.0, 1.4, 100),
    ]  # fmt: skip
    assert len(found) == grid.number
    for cell in found:
        document = cell.document()
        assert set(document["variants"]) == {"whole", "single"}
        assert document["least"] in ("whole", "single")
        assert document["ratio"] is not None


def test_who_does_not_serve_in_time_does_not_cost_least() -> None:
    late = COSTS | {"good_share": 0.5, "gpu_s_per_1000_good_tokens": 0.1}
    assert Cell(1.0, 0.0, 1, {"whole": COSTS, "single": late}).document()["least"] == "whole"
    assert Cell(1.0, 0.0, 1, {"whole": None, "single": late}).document()["least"] is None
    cheaper = COSTS | {"gpu_s_per_1000_good_tokens": 1.0}
    assert Cell(1.0, 0.0, 1, {"whole": COSTS, "single": cheaper}).document()["ratio"] == 0.5
