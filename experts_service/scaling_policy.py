"""How many replicas an expert group should have, from how busy they are. Plain numbers; knows no rows, no Serve.

Serve calls the policy with what each replica reports (`ExpertService.record_autoscaling_stats`), averaged over a few
seconds, and applies bounds and delays itself. Its own signal, ongoing requests, is no use: rows do not pass through it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

BUSY_FRACTION, QUEUE_S = "busy_fraction", "queue_s"  # of one replica
SLACK = 0.8  # fewer replicas only when they would be busy for less than this part of the target: no to and fro


def desired_replicas(
    current: int,
    busy_fractions: Collection[float],
    queue_s: Collection[float],
    *,
    target_busy_fraction: float,
    max_queue_s: float,
) -> int:
    """How many of `current` replicas there should be; the two collections hold a number of each that reports.

    The work of the group, in replicas that are busy all the time, is spread so that each is busy for the target. A
    longer wait than `max_queue_s` asks for one more whatever the fractions say: one coordinator's steps leave a shard
    idle between two layers, however late its rows are. Replicas that do not report yet count as idle.
    """
    if not busy_fractions or len(busy_fractions) < current:
        return current  # one has just started, or is being replaced: decide when it reports
    work = sum(busy_fractions)
    wanted = max(1, math.ceil(work / target_busy_fraction - 1e-9))
    waits = sum(queue_s) / len(queue_s) if queue_s else 0.0
    if waits > max_queue_s:
        return max(wanted, current + 1)
    if wanted < current:
        fewer = current - 1
        return fewer if work / fewer <= SLACK * target_busy_fraction else current
    return wanted


class ExpertScalingPolicy:
    """`desired_replicas` as Serve calls it; a class, because only those are given arguments."""

    def __init__(self, target_busy_fraction: float, max_queue_s: float) -> None:
        self._target_busy_fraction = target_busy_fraction
        self._max_queue_s = max_queue_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        return desired_replicas(
            context.current_num_replicas,
            reported.get(BUSY_FRACTION, {}).values(),
            reported.get(QUEUE_S, {}).values(),
            target_busy_fraction=self._target_busy_fraction,
            max_queue_s=self._max_queue_s,
        ), {}
