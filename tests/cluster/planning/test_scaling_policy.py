"""The scaling policy as plain numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.planning.scaling_policy import LOAD, WAITING, ScalingPolicy, desired_replicas, replica_options

EXPERTS = {"target_load": 0.7, "max_waiting": 0.01}
GATEWAYS = {"target_load": 64.0, "max_waiting": 0.0}


@pytest.mark.parametrize(
    ("current", "busy", "queue_s", "wanted"),
    [
        (1, [0.0], [0.0], 1),
        (1, [0.69], [0.001], 1),
        (1, [0.95], [0.001], 2),
        (1, [0.2], [0.05], 2),  # rarely busy, but rows wait
        (2, [0.9, 0.9], [0.0, 0.0], 3),
        (2, [0.35, 0.3], [0.0, 0.0], 2),  # one alone would be too near its target
        (2, [0.2, 0.2], [0.0, 0.0], 1),
        (3, [0.0, 0.0, 0.0], [0.0] * 3, 2),  # one at a time
        (2, [1.0], [0.5], 2),  # the second does not report yet
        (1, [], [], 1),
    ],
)
def test_a_group_is_scaled_by_its_own_load(current, busy, queue_s, wanted):
    assert desired_replicas(current, busy, queue_s, **EXPERTS) == wanted


@pytest.mark.parametrize(
    ("current", "requests", "wanted"),
    [(1, [0], 1), (1, [64], 1), (1, [65], 2), (1, [1000], 16), (3, [50, 50, 3], 3), (3, [50, 50, 0], 2)],
)
def test_gateways_are_scaled_by_their_requests(current, requests, wanted):
    assert desired_replicas(current, requests, [], **GATEWAYS) == wanted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.1, 1.0))
def test_the_number_it_asks_for_is_stable(loads, target):
    """The same load spread over the replicas asked for asks for no further change of direction."""
    settings = {"target_load": target, "max_waiting": 1.0}
    wanted = desired_replicas(len(loads), loads, [0.0], **settings)
    again = desired_replicas(wanted, [min(1.0, sum(loads) / wanted)] * wanted, [0.0], **settings)
    assert again == wanted if wanted > len(loads) else again <= wanted
    assert wanted <= max(len(loads), math.ceil(sum(loads) / target))


def test_serve_calls_it_with_what_replicas_report():
    class Context:
        current_num_replicas = 1
        aggregated_metrics = {LOAD: {"a": 0.9}, WAITING: {"a": 0.0}}  # noqa: RUF012

    assert ScalingPolicy(**EXPERTS)(Context()) == (2, {})
    Context.aggregated_metrics = {}
    assert ScalingPolicy(**EXPERTS)(Context()) == (1, {})


def test_the_options_are_what_serve_takes():
    """A fixed number where the bounds leave no choice, else a configuration with our policy and the bounds."""
    assert replica_options(ScalingConfig(min_replicas=2, max_replicas=2)) == {"num_replicas": 2}
    bounds = CoordinatorScalingConfig(
        min_replicas=1, max_replicas=3, upscale_delay_s=2.0, target_used_fraction=0.5, max_waiting=4.0
    )
    options = replica_options(bounds)
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas, config.upscale_delay_s) == (1, 3, 2.0)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(type("Context", (), {"current_num_replicas": 1, "aggregated_metrics": {LOAD: {"a": 1.2}}})) == (3, {})
