"""How often each expert of each layer is asked for, and how that drifts. Numbers only.

    uniform                 all alike
    zipf:S                  the expert of rank n as often as 1/n^S, the same order in every layer
    zipf:S:layers           another order in each layer, as gates have it that know nothing of each other
    zipf:S:drift=H          in H hours the order becomes another one

Rows that a server counted (`/metrics`) are by expert, of all layers together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError

Chances = NDArray[np.float64]  # [L, E]: that a row of that layer asks for that expert
EPOCH_S = 900.0  # how often what drifts is looked at


def spread(weights: Sequence[float], top_k: int) -> list[float]:
    """Chances in proportion to weights, none above 1, all together `top_k`: a row asks for so many different ones."""
    chances = [0.0] * len(weights)
    left, open_ones = float(top_k), [index for index, weight in enumerate(weights) if weight > 0]
    while open_ones and left > 1e-12:
        total = sum(weights[index] for index in open_ones)
        capped = [index for index in open_ones if weights[index] * left / total >= 1]
        if not capped:
            for index in open_ones:
                chances[index] = weights[index] * left / total
            break
        for index in capped:
            chances[index] = 1.0
        left -= len(capped)
        open_ones = [index for index in open_ones if index not in capped]
    return chances


@dataclass(frozen=True)
class Popularity:
    """Of one model's experts, at any time."""

    layers: int
    experts: int
    top_k: int
    exponent: float = 0.0
    by_layer: bool = False
    drift_s: float = 0.0  # 0: it stays
    counted: tuple[float, ...] | None = None  # rows of each expert
    seed: int = 0

    @classmethod
    def parse(cls, text: str, layers: int, experts: int, top_k: int, seed: int) -> Popularity:
        """Raises ConfigError."""
        kind, *rest = text.split(":")
        if kind == "uniform" and not rest:
            return cls(layers, experts, top_k, seed=seed)
        options: dict[str, Any] = {}
        try:
            if kind != "zipf" or not rest:
                raise ValueError
            exponent = float(rest[0])
            for option in rest[1:]:
                if option == "layers":
                    options["by_layer"] = True
                elif option.startswith("drift="):
                    options["drift_s"] = 3600 * float(option.removeprefix("drift="))
                else:
                    raise ValueError
            if not (0 <= exponent <= 10 and options.get("drift_s", 0.0) >= 0):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--popularity: {text!r}: expected uniform, zipf:1.0, with :layers, :drift=4 (hours), or a URL"
            ) from None
        return cls(layers, experts, top_k, exponent, seed=seed, **options)

    def epoch(self, seconds: float) -> int:
        """Between two of them it does not change."""
        return int(seconds // EPOCH_S) if self.drift_s else 0

    def chances(self, epoch: int = 0) -> Chances:
        """[L, E]"""
        if self.counted is not None:
            return np.tile(np.array(spread(self.counted, self.top_k)), (self.layers, 1))
        if not self.exponent:
            return np.full((self.layers, self.experts), self.top_k / self.experts)
        turn, part = divmod(epoch * EPOCH_S / self.drift_s, 1) if self.drift_s else (0.0, 0.0)
        before, after = self._orders(int(turn)), self._orders(int(turn) + 1) if part else None
        rows = []
        for layer in range(self.layers if self.by_layer else 1):
            weights = before[layer]
            if after is not None:
                weights = [(1 - part) * one + part * other for one, other in zip(weights, after[layer], strict=True)]
            rows.append(spread(weights, self.top_k))
        return np.array(rows if self.by_layer else rows * self.layers)

    def _orders(self, turn: int) -> list[list[float]]:
        """Weights of each layer's experts, or of all layers'."""
        rng = random.Random(f"{self.seed} popularity {turn}")
        weights = [1 / rank**self.exponent for rank in range(1, self.experts + 1)]
        orders = []
        for _ in range(self.layers if self.by_layer else 1):
            shuffled = list(weights)
            rng.shuffle(shuffled)
            orders.append(shuffled)
        return orders
