"""How many replicas a deployment should have, from what they report. Plain numbers; knows no rows and no Serve.

    expert-3      load: the part of the time that the shard computes     waiting: seconds until a dispatch has its turn
    coordinator   load: the part of its KV cache or batch that is taken  waiting: sequences
    gateway       load: requests                                         waiting: nothing

Each replica says both in `record_autoscaling_stats`; Serve averages them over a few seconds, calls the policy, and
applies bounds and delays itself. Its own signal, ongoing requests, is no use: rows do not pass through it, and a
coordinator's requests differ by a thousand times in what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster.config import CoordinatorScalingConfig, GatewayScalingConfig, ScalingConfig

if TYPE_CHECKING:
    from cluster.planning.tier_loads import TierLoads

LOAD, WAITING = "load", "waiting"  # of one replica
SLACK = 0.8  # fewer replicas only when they would carry less than this part of the target: no to and fro
REPORT_INTERVAL_S, LOOK_BACK_S = 1.0, 5.0  # how often a replica reports; over what Serve averages


def desired_replicas(
    current: int, loads: Collection[float], waiting: Collection[float], *, target_load: float, max_waiting: float
) -> int:
    """How many of `current` replicas there should be; the two collections hold a number of each that reports.

    The load of all is spread so that each carries the target. More waiting than `max_waiting`, on average, asks for one
    more whatever the loads say: one coordinator's steps leave a shard idle between two layers, however late its rows
    are. It goes down one at a time, and only when the others would carry what there is with room to spare.
    """
    if not loads or len(loads) < current:
        return current  # one has just started, or is being replaced: decide when it reports
    load = sum(loads)
    wanted = max(1, math.ceil(load / target_load - 1e-9))
    if waiting and sum(waiting) / len(waiting) > max_waiting:
        return max(wanted, current + 1)
    if wanted < current:
        fewer = current - 1
        return fewer if load / fewer <= SLACK * target_load else current
    return wanted


class Reports(Protocol):
    """What Serve's AutoscalingContext has of it."""

    app_name: str | None
    deployment_name: str
    current_num_replicas: int
    capacity_adjusted_max_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None  # name → replica → its average
    current_time: float | None  # seconds
    config: Any  # AutoscalingConfig


class ScalingPolicy:
    """`desired_replicas` as Serve calls it; a class, because only those are given arguments."""

    def __init__(
        self, target_load: float, max_waiting: float, tiers: Sequence[str] = (), loads: TierLoads | None = None
    ) -> None:
        """`tiers`: the deployments of this one's expert group, where one of them begins without a replica.

        `loads`: what they tell each other; None: this process's, which all policies of Serve's controller share.
        """
        self._target_load = target_load
        self._max_waiting = max_waiting
        self._tiers = list(tiers)
        self._loads = loads

    def __call__(self, context: Reports) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        loads = reported.get(LOAD, {}).values()
        wanted = desired_replicas(
            context.current_num_replicas,
            loads,
            reported.get(WAITING, {}).values(),
            target_load=self._target_load,
            max_waiting=self._max_waiting,
        )
        return self._beside_other_tiers(context, wanted, sum(loads)) if self._tiers else wanted, {}

    def _beside_other_tiers(self, context: Reports, wanted: int, load: float) -> int:
        """The same where the tier before this one is preferred; the bound of this one keeps what it has at least."""
        from cluster.planning import tier_loads

        loads = self._loads or tier_loads.LOADS
        now, application = context.current_time or 0.0, context.app_name or ""
        place = self._tiers.index(context.deployment_name)
        if place:
            before, this = (application, self._tiers[place - 1]), (application, context.deployment_name)
            loads.learn(this, before, load=load, replicas=context.current_num_replicas, now=now)
            if not context.current_num_replicas:
                wanted = int(loads.lacks(before, context.config.upscale_delay_s, now))
            elif context.current_num_replicas == 1 == wanted and loads.can_take(
                before, this, load, SLACK * self._target_load
            ):
                wanted = 0
        loads.tell(
            (application, context.deployment_name),
            load=load,
            replicas=context.current_num_replicas,
            has_enough=wanted <= context.capacity_adjusted_max_replicas,
            now=now,
        )
        return wanted


def replica_options(
    scaling: ScalingConfig | CoordinatorScalingConfig | GatewayScalingConfig, tiers: Sequence[str] = ()
) -> dict[str, Any]:
    """Serve's options for the number of a deployment's replicas, as plain data: fixed, or by this policy.

    Serve begins with `min_replicas`; without a word on that, one edited number is enough to have more. `tiers`: as the
    policy has them; those that may have no more replicas say whether they lack one.
    """
    if scaling.min_replicas == scaling.max_replicas and not tiers:
        return {"num_replicas": scaling.min_replicas}
    match scaling:
        case CoordinatorScalingConfig():
            target_load, max_waiting = scaling.target_used_fraction, scaling.max_waiting
        case GatewayScalingConfig():
            target_load, max_waiting = scaling.target_requests, 0.0
        case ScalingConfig():
            target_load, max_waiting = scaling.target_busy_fraction, scaling.max_queue_s
    arguments: dict[str, Any] = {"target_load": target_load, "max_waiting": max_waiting}
    policy = {
        "policy_function": "cluster.planning.scaling_policy:ScalingPolicy",
        "policy_kwargs": arguments | ({"tiers": list(tiers)} if tiers else {}),
    }
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": REPORT_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
            "policy": policy,
        }
    }
