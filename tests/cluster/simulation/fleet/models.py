"""Fleets of one small model, for tests of what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.checkpoint.outline import outline
from cluster.config import parse_config
from cluster.planning.costs import ASSUMED, Figure
from cluster.planning.gpus import GPUS
from cluster.planning.tiers import Cpus
from cluster.simulation.fleet.popularity import Popularity
from cluster.simulation.fleet.step_costs import Hardware
from cluster.simulation.fleet.variants import Options, Served

NEXT_TO_NOTHING = {
    field: replace(getattr(ASSUMED, field), value=1e-6)
    for field in ("python", "captured", "launch", "copy", "lane_dispatch", "lane_group", "hop")
}
QUICK = replace(ASSUMED, **NEXT_TO_NOTHING, lane_bandwidth=Figure(50e9, "", False, ""))
CPUS = Cpus(50e9, 2e12)


def hardware(**changes: Any) -> Hardware:
    return replace(Hardware(GPUS["H200"], QUICK, CPUS, QUICK.lanes), **changes)


def served(skew: float = 0.0, options: Options | None = None, on: Hardware | None = None, **model: Any) -> Served:
    a = MIXTRAL_8X7B
    document = {"name": "mixtral", "path": "mixtral-8x7b"} | model
    return Served(
        parse_config({"models": [document]}, source="a test").models[0],
        outline("mixtral-8x7b", a),
        on or hardware(),
        Popularity(a.num_expert_layers, a.num_experts, a.top_k, exponent=skew),
        options or Options(),
    )
