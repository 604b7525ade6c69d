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
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from cluster.config import CoordinatorScalingConfig, GatewayScalingConfig, ScalingConfig

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

    current_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None  # name → replica → its average


class ScalingPolicy:
    """`desired_replicas` as Serve calls it; a class, because only those are given arguments."""

    def __init__(self, target_load: float, max_waiting: float) -> None:
        self._target_load = target_load
        self._max_waiting = max_waiting

    def __call__(self, context: Reports) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        return desired_replicas(
            context.current_num_replicas,
            reported.get(LOAD, {}).values(),
            reported.get(WAITING, {}).values(),
            target_load=self._target_load,
            max_waiting=self._max_waiting,
        ), {}


def replica_options(scaling: ScalingConfig | CoordinatorScalingConfig | GatewayScalingConfig) -> dict[str, Any]:
    """Serve's options for the number of a deployment's replicas, as plain data: fixed, or by this policy.

    Serve begins with `min_replicas`; without a word on that, one edited number is enough to have more.
    """
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.min_replicas}
    match scaling:
        case CoordinatorScalingConfig():
            target_load, max_waiting = scaling.target_used_fraction, scaling.max_waiting
        case GatewayScalingConfig():
            target_load, max_waiting = scaling.target_requests, 0.0
        case ScalingConfig():
            target_load, max_waiting = scaling.target_busy_fraction, scaling.max_queue_s
    policy = {
        "policy_function": "cluster.planning.scaling_policy:ScalingPolicy",
        "policy_kwargs": {"target_load": target_load, "max_waiting": max_waiting},
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
