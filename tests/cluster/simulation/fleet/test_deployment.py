"""Replicas follow the product's policy with Serve's delays, as Serve itself has them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from ray.serve.autoscaling_policy import _apply_delay_logic

from cluster.config import ScalingConfig
from cluster.planning.tier_loads import TierLoads
from cluster.simulation.fleet.deployment import Deployment
from cluster.simulation.scaling import Delays


@pytest.mark.parametrize("seed", range(20))
def test_delays_are_serves(seed: int) -> None:
    rng = random.Random(seed)
    up, down = rng.choice([0.0, 1.0, 10.0]), rng.choice([0.0, 5.0, 30.0])
    config = SimpleNamespace(upscale_delay_s=up, downscale_delay_s=down, downscale_to_zero_delay_s=None)
    delays, state, serves, ours, now, desired = Delays(up, down), {}, 2, 2, 0.0, 2
    for _ in range(2000):
        now += rng.choice([1.0, 1.0, 1.0, 0.5])
        if rng.random() < 0.1:
            desired = rng.randrange(0, 6)
        serves, state = _apply_delay_logic(desired, serves, config, state, _now=now)
        ours = delays.apply(desired, ours, now)
        assert ours == serves, now


def busy(deployment: Deployment, load: float, seconds: int, now: float = 0.0) -> float:
    for _ in range(seconds):
        now += 1.0
        deployment.arrive(now)
        deployment.report(load, 0.0)
        deployment.decide(now)
    return now


def test_a_busy_group_gets_a_replica_after_its_delay_and_its_load() -> None:
    scaling = ScalingConfig(min_replicas=1, max_replicas=3, upscale_delay_s=10, downscale_delay_s=120)
    deployment = Deployment("expert-0", scaling, start_s=30.0)
    now = busy(deployment, 1.0, 9)
    assert (deployment.running, deployment.number) == (1, 1)
    now = busy(deployment, 1.0, 3, now)
    assert (deployment.running, deployment.number) == (1, 2), "it starts"
    now = busy(deployment, 1.0, 31, now)
    assert deployment.running == 2
    now = busy(deployment, 0.05, 60, now)
    assert deployment.running == 2, "not before it was idle for two minutes"
    busy(deployment, 0.05, 75, now)
    assert deployment.running == 1


def test_bounds_hold_and_what_is_fixed_stays() -> None:
    most = Deployment("expert-0", ScalingConfig(min_replicas=2, max_replicas=3), start_s=1.0)
    busy(most, 1.0, 300)
    assert most.running == 3
    least = Deployment("expert-0", ScalingConfig(min_replicas=2, max_replicas=3), start_s=1.0)
    busy(least, 0.0, 900)
    assert least.running == 2
    fixed = Deployment("expert-0", ScalingConfig(min_replicas=2, max_replicas=2), start_s=1.0)
    busy(fixed, 1.0, 300)
    assert fixed.running == 2


def test_fleets_beside_each_other_do_not_hear_of_each_other() -> None:
    """Policies told each other by a table of the process; a second simulation began with what the first had left."""
    from cluster.planning import tier_loads

    before = dict(tier_loads.LOADS._tiers)
    names = ("expert-0", "expert-0-tier1")
    first = Deployment(names[0], ScalingConfig(min_replicas=1, max_replicas=1), 1.0, tiers=names, loads=TierLoads())
    busy(first, 1.0, 30)
    assert tier_loads.LOADS._tiers == before
