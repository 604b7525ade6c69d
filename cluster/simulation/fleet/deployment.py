"""The replicas of one deployment over hours: they report, some start, some drain. Plain numbers; no Serve."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.planning.scaling_policy import LOOK_BACK_S, REPORT_INTERVAL_S
from cluster.planning.tier_loads import TierLoads
from cluster.simulation.scaling import Scaling


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

    def __post_init__(self) -> None:
        self._serve = Scaling("fleet", self.name, self.scaling, self.tiers, self.loads)
        self._reports: deque[tuple[float, float]] = deque(maxlen=max(1, round(LOOK_BACK_S / REPORT_INTERVAL_S)))
        self.running = self._serve.target  # they are there at 0

    @property
    def target(self) -> int:
        """How many there should be."""
        return self._serve.target

    @property
    def number(self) -> int:
        """Of replicas that hold something: those that start are among them."""
        return self.running + len(self.starting)

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
        if self._serve.is_fixed:
            return 0
        averages: dict[int, tuple[float, ...]] = {}
        if self._reports:
            mean = tuple(sum(one) / len(self._reports) for one in zip(*self._reports, strict=True))
            averages = dict.fromkeys(range(self.running), mean)
        self._serve.target = self._serve.wanted(self.running, averages, now)
        while self.number < self.target:
            self.starting.append(now + self.start_s)
        while self.number > self.target and self.starting:
            self.starting.pop()
        fewer = max(0, self.number - self.target)
        self.running -= fewer
        return fewer
