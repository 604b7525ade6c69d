"""The replicas of one deployment, as the product's policy and Serve's delays have it. Plain numbers; no Serve.

    reports of running replicas → ScalingPolicy (the product's) → delays, bounds (Serve's) → replicas start, or drain

What Serve does is as in ray/serve/autoscaling_policy.py and _private/autoscaling_state.py of 2.60; a test holds the
delays against Ray's own. Serve decides some ten times a second, and this once: replicas report once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.planning.scaling_policy import LOAD, LOOK_BACK_S, REPORT_INTERVAL_S, WAITING, ScalingPolicy
from cluster.planning.tier_loads import TierLoads
from cluster.simulation.serve import PolicyContext

EPSILON_S = 1e-6  # Serve's, of what has elapsed


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


@dataclass
class Deployment:
    """Of coordinators, or of one expert group on one tier."""

    name: str
    scaling: ScalingConfig | CoordinatorScalingConfig
    start_s: float  # from the decision to a replica that runs: its process, and its weights
    tiers: tuple[str, ...] = ()  # as the policy has them
    loads: TierLoads | None = None
    running: int = 0
    starting: deque[float] = field(default_factory=deque)  # when each will run
    target: int = 0

    def __post_init__(self) -> None:
        match self.scaling:
            case CoordinatorScalingConfig():
                target_load, max_waiting = self.scaling.target_used_fraction, self.scaling.max_waiting
            case ScalingConfig():
                target_load, max_waiting = self.scaling.target_busy_fraction, self.scaling.max_queue_s
        self._policy = ScalingPolicy(target_load, max_waiting, self.tiers, self.loads)
        self._delays = Delays(self.scaling.upscale_delay_s, self.scaling.downscale_delay_s)
        self._reports: deque[tuple[float, float]] = deque(maxlen=max(1, round(LOOK_BACK_S / REPORT_INTERVAL_S)))
        self.running = self.target = self.scaling.min_replicas  # Serve begins with as many; they are there at 0

    @property
    def number(self) -> int:
        """Of replicas that hold something: those that start are among them."""
        return self.running + len(self.starting)

    @property
    def is_fixed(self) -> bool:
        """Whether nothing decides."""
        return self.scaling.min_replicas == self.scaling.max_replicas and not self.tiers

    def arrive(self, now: float) -> bool:
        """Replicas that have started run. Whether there were any."""
        before = self.running
        while self.starting and self.starting[0] <= now:
            self.starting.popleft()
            self.running += 1
        return self.running != before

    def report(self, load: float, waiting: float) -> None:
        """Of each running replica, in the last second, on average over them."""
        self._reports.append((load, waiting))

    def decide(self, now: float) -> int:
        """How many replicas there should be fewer of those that run; those that start are dropped first."""
        if self.is_fixed:
            return 0
        aggregated: dict[str, dict[int, float]] = {}
        if self._reports and self.running:
            loads, waits = zip(*self._reports, strict=True)
            replicas = range(self.running)
            aggregated = {
                LOAD: dict.fromkeys(replicas, sum(loads) / len(loads)),
                WAITING: dict.fromkeys(replicas, sum(waits) / len(waits)),
            }
        context = PolicyContext(
            "fleet", self.name, self.running, self.scaling.max_replicas, aggregated, now, config=self.scaling
        )
        desired, _ = self._policy(context)
        if not self.running and desired > 0 and not self.starting:
            target = desired  # Serve waits for no delay where there is none
        else:
            target = self._delays.apply(max(0, desired), self.target, now)
        self.target = min(max(target, self.scaling.min_replicas), self.scaling.max_replicas)
        while self.number < self.target:
            self.starting.append(now + self.start_s)
        while self.number > self.target and self.starting:
            self.starting.pop()
        fewer = max(0, self.number - self.target)
        self.running -= fewer
        return fewer
