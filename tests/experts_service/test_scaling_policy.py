"""The scaling policy as plain numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts_service.scaling_policy import BUSY_FRACTION, QUEUE_S, ExpertScalingPolicy, desired_replicas

SETTINGS = {"target_busy_fraction": 0.7, "max_queue_s": 0.01}


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
    assert desired_replicas(current, busy, queue_s, **SETTINGS) == wanted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.1, 1.0))
def test_the_number_it_asks_for_is_stable(busy, target):
    """The same work spread over the replicas asked for asks for no further change of direction."""
    settings = {"target_busy_fraction": target, "max_queue_s": 1.0}
    wanted = desired_replicas(len(busy), busy, [0.0], **settings)
    again = desired_replicas(wanted, [min(1.0, sum(busy) / wanted)] * wanted, [0.0], **settings)
    assert again == wanted if wanted > len(busy) else again <= wanted
    assert wanted <= max(len(busy), math.ceil(sum(busy) / target))


def test_serve_calls_it_with_what_replicas_report():
    class Context:
        current_num_replicas = 1
        aggregated_metrics = {BUSY_FRACTION: {"a": 0.9}, QUEUE_S: {"a": 0.0}}  # noqa: RUF012

    assert ExpertScalingPolicy(**SETTINGS)(Context()) == (2, {})
    Context.aggregated_metrics = {}
    assert ExpertScalingPolicy(**SETTINGS)(Context()) == (1, {})
