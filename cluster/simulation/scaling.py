"""How many replicas Serve keeps of one deployment: what the product's policy asks for, and when that counts.

    reports of running replicas → ScalingPolicy (the product's) → delays, then bounds (Serve's) → the target

What Serve does is as in ray/serve/autoscaling_policy.py and _private/autoscaling_state.py of 2.60; a test holds the
delays against Ray's own. Serve decides some ten times a second, and this once: replicas report once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.planning.scaling_policy import LOAD, WAITING, ScalingPolicy
from cluster.planning.tier_loads import TierLoads

EPSILON_S = 1e-6  # Serve's, of what has elapsed

Averages = Mapping[Any, tuple[float, ...]]  # load and waiting of each replica that reports


@dataclass(slots=True)
class PolicyContext:
    """What a policy sees of Serve."""

    app_name: str | None
    deployment_name: str
    current_num_replicas: int
    capacity_adjusted_max_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    current_time: float | None
    config: Any


class Delays:
    """Serve's: the policy has to ask for more, or for fewer, for so long."""

    def __init__(self, upscale_delay_s: float, downscale_delay_s: float) -> None:
        self._delays = {1: upscale_delay_s, -1: downscale_delay_s}
        self._direction = 0
        self._since: float | None = None

    def apply(self, desired: int, target: int, now: float) -> int:
        """The new target."""
        direction = (desired > target) - (desired < target)
        if direction != self._direction or not direction:
            self._direction, self._since = direction, now if direction else None
        if not direction:
            return target
        assert self._since is not None
        if now - self._since + EPSILON_S < self._delays[direction]:
            return target
        self._direction, self._since = 0, None
        return max(1, desired) if direction < 0 and target > 1 else desired


class Scaling:
    """One deployment's numbers, and Serve's memory of a decision."""

    def __init__(
        self,
        application: str,
        name: str,
        bounds: ScalingConfig | CoordinatorScalingConfig,
        tiers: Sequence[str] = (),
        loads: TierLoads | None = None,
    ) -> None:
        """`tiers`, `loads`: as the policy has them."""
        match bounds:
            case CoordinatorScalingConfig():
                self.target_load, self.max_waiting = bounds.target_used_fraction, bounds.max_waiting
            case ScalingConfig():
                self.target_load, self.max_waiting = bounds.target_busy_fraction, bounds.max_queue_s
        self.name = name
        self.bounds = bounds
        self.target = bounds.min_replicas  # Serve begins with as many
        self.changed = (float("-inf"), 0)  # when it last changed, and whether upwards
        self._application = application
        self._is_one_of_tiers = bool(tiers)
        self._policy = ScalingPolicy(self.target_load, self.max_waiting, tiers, loads)
        self._delays = Delays(bounds.upscale_delay_s, bounds.downscale_delay_s)

    @property
    def is_fixed(self) -> bool:
        """Whether nothing decides."""
        return self.bounds.min_replicas == self.bounds.max_replicas and not self._is_one_of_tiers

    def wanted(self, current: int, averages: Averages, now: float) -> int:
        """How many there should be from now on, where `current` run."""
        bounds = self.bounds
        reported = {
            LOAD: {who: load for who, (load, _) in averages.items()},
            WAITING: {who: waiting for who, (_, waiting) in averages.items()},
        }
        desired, _ = self._policy(
            PolicyContext(self._application, self.name, current, bounds.max_replicas, reported, now, bounds)
        )
        if current or desired <= 0:  # else Serve waits for no delay: there is none
            desired = self._delays.apply(max(0, desired), self.target, now)
        return min(max(desired, bounds.min_replicas), bounds.max_replicas)

    def change(self, target: int, now: float) -> None:
        """There should be so many now."""
        self.changed = (now, 1 if target > self.target else -1)
        self.target = target
