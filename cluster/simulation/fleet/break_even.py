"""At what skew, load and length of prompts each way to serve costs least. Runs fleets at even loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import DoesNotFit
from cluster.simulation.fleet.fleet import serve
from cluster.simulation.fleet.outcome import Objective
from cluster.simulation.fleet.trace import Synthetic
from cluster.simulation.fleet.variants import SINGLE, WHOLE, Served, tuned

ABLE = 0.9  # of requests that have to be good for a cost to be one
COUNTED = (WHOLE, SINGLE)


@dataclass(frozen=True)
class Grid:
    """Which settings are run."""

    rates: tuple[float, ...] = (0.25, 1.0, 4.0)  # times the rate that was asked for
    skews: tuple[float, ...] = (0.0, 1.4)
    prompts: tuple[int, ...] = (256, 8192)
    hours: float = 0.12  # after as long that is not counted

    @property
    def number(self) -> int:
        """Of settings."""
        return len(self.rates) * len(self.skews) * len(self.prompts)


@dataclass(frozen=True)
class Cell:
    """One setting."""

    rate: float
    skew: float
    prompt: int
    variants: dict[str, dict[str, Any] | None]  # None: it does not fit

    def document(self) -> dict[str, Any]:
        """As JSON."""
        able = {
            name: float(one["gpu_s_per_1000_good_tokens"])
            for name, one in self.variants.items()
            if one is not None and (one["good_share"] or 0.0) >= ABLE
        }
        both = WHOLE in able and SINGLE in able
        return {
            "rate": self.rate,
            "skew": self.skew,
            "prompt": self.prompt,
            "variants": self.variants,
            "least": min(able, key=lambda name: able[name], default=None),
            "ratio": able[SINGLE] / able[WHOLE] if both else None,
        }


def cells(served: Served, synthetic: Synthetic, grid: Grid, objective: Objective, seed: int) -> Iterator[Cell]:
    """One after the other; GPU time is of the whole run, good tokens as well."""
    objective = replace(objective, warm_up_s=grid.hours * 3600)
    for prompt in grid.prompts:
        for rate in grid.rates:
            even = replace(
                synthetic, rate=synthetic.rate * rate, hours=2 * grid.hours, swing=0.0, bursts=0.0, prompt=float(prompt)
            )
            arrivals = even.arrivals(seed)
            for skew in grid.skews:
                popular = replace(served, popularity=replace(served.popularity, exponent=skew, counted=None))
                of_variants: dict[str, dict[str, Any] | None] = {}
                for name in COUNTED:
                    try:
                        fleet = popular.whole() if name == WHOLE else popular.split(name, objective)
                    except DoesNotFit:
                        of_variants[name] = None
                        continue
                    fleet = tuned(fleet, objective, arrivals)
                    document = serve(fleet, arrivals, seed).document(objective)
                    of_variants[name] = {key: document[key] for key in document if key != "over_time"}
                yield Cell(even.rate, skew, prompt, of_variants)
