"""When the layers of a step ran, while somebody asks for it. Knows seconds and numbers of layers; no span, no tensor.

A client asks with W3C's `tracestate: manta=layers`, beside its `traceparent` or without.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

MOST_GROUPS = 8  # of consecutive layers, in a step
MAX_TRACESTATE = 512  # characters that are looked at, as W3C has tracers keep


def wants_layers(tracestate: str) -> bool:
    """Whether a client's `tracestate` asks for the layers of the steps that its request is in."""
    return any(member.strip() == "manta=layers" for member in tracestate[:MAX_TRACESTATE].split(","))


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive layers of one pass, timed by `perf_counter`."""

    first: int
    last: int
    began: float
    ended: float
    experts_s: float  # of it, from sending rows to experts until they were combined; 0 where one call is more


@dataclass(slots=True)
class LayerPass:
    """One way through all layers: a step's, or that of one of its microbatches."""

    began: float = field(default_factory=time.perf_counter)
    layers: list[tuple[float, float]] = field(default_factory=list)  # the end of each, and the seconds of its experts
    _sent_at: float = 0.0  # the same of the layer that is computed
    _experts_s: float = 0.0

    def sent(self) -> None:
        """The layer's rows go to its experts now."""
        self._sent_at = time.perf_counter()

    def combined(self) -> None:
        """They have answered, and the answers are combined."""
        self._experts_s += time.perf_counter() - self._sent_at

    def layer(self) -> None:
        """The next one has ended."""
        self.layers.append((time.perf_counter(), self._experts_s))
        self._experts_s = 0.0

    def groups(self) -> list[LayerGroup]:
        """At most MOST_GROUPS, of as many layers each as can be."""
        size = -(-len(self.layers) // MOST_GROUPS) or 1
        found: list[LayerGroup] = []
        for first in range(0, len(self.layers), size):
            part = self.layers[first : first + size]
            began = found[-1].ended if found else self.began
            found.append(LayerGroup(first, first + len(part) - 1, began, part[-1][0], sum(took for _, took in part)))
        return found


class LayerTimes:
    """Of the step that is computed. Used by the engine's thread, but for `wanted`."""

    def __init__(self) -> None:
        self.wanted = False
        self._passes: list[LayerPass] = []

    def begin(self) -> LayerPass | None:
        """A pass begins; None if nobody asks."""
        if not self.wanted:
            return None
        self._passes.append(LayerPass())
        return self._passes[-1]

    def take(self) -> list[LayerPass]:
        """The passes since the last call."""
        passes, self._passes = self._passes, []
        return passes
