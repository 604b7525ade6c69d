"""The scaling policy as plain numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig

from cluster.config import CoordinatorScalingConfig, ScalingConfig, TierScalingConfig
from cluster.planning import tier_loads
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
    class Context(Reported):
        current_num_replicas = 1
        aggregated_metrics = {LOAD: {"a": 0.9}, WAITING: {"a": 0.0}}  # noqa: RUF012

    assert ScalingPolicy(**EXPERTS)(Context()) == (2, {})
    Context.aggregated_metrics = {}
    assert ScalingPolicy(**EXPERTS)(Context()) == (1, {})


class Tiers:
    """Group 2 on two tiers, as Serve's controller calls their policies, one after the other, every second."""

    def __init__(self, monkeypatch, **bounds):
        monkeypatch.setattr(tier_loads, "LOADS", tier_loads.TierLoads())
        names = ["expert-2", "expert-2-tier1"]
        self.now, self.running = 0.0, dict.fromkeys(names, 0)
        self.bounds = {"expert-2": (1, 1), "expert-2-tier1": (0, 2)} | bounds
        self.policies = {name: ScalingPolicy(**EXPERTS, tiers=names) for name in names}

    def after(self, seconds, **busy):
        """What they ask for in the end; `busy` is that of each replica, `on_first` and `on_second`."""
        busy = {"expert-2": busy.get("on_first", 0.0), "expert-2-tier1": busy.get("on_second", 0.0)}
        wanted = {}
        for _ in range(seconds):
            self.now += 1.0
            for name, policy in self.policies.items():
                context = Reported()
                context.deployment_name, context.current_num_replicas = name, self.running[name]
                context.capacity_adjusted_max_replicas, context.current_time = self.bounds[name][1], self.now
                replicas = range(self.running[name])
                context.aggregated_metrics = {LOAD: dict.fromkeys(replicas, busy[name]), WAITING: {}}
                number, _ = policy(context)
                wanted[name] = min(max(number, self.bounds[name][0]), self.bounds[name][1])
        return wanted["expert-2"], wanted["expert-2-tier1"]


class Reported:
    app_name, deployment_name, capacity_adjusted_max_replicas, current_time = "mixtral", "expert-2", 1, 0.0
    config = SimpleNamespace(upscale_delay_s=10.0)


def test_a_tier_that_begins_with_none_gets_one_when_the_tier_before_needs_more_than_it_may_have(monkeypatch):
    tiers = Tiers(monkeypatch)
    assert tiers.after(60) == (1, 0), "the first one is still loading"
    tiers.running["expert-2"] = 1
    assert tiers.after(60, on_first=0.6) == (1, 0)
    assert tiers.after(9, on_first=0.9) == (1, 0), "not for a moment's load"
    assert tiers.after(1, on_first=0.6) == (1, 0)
    assert tiers.after(10, on_first=0.9) == (1, 0)
    assert tiers.after(1, on_first=0.9) == (1, 1)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_first=0.5, on_second=0.5) == (1, 1), "one alone could not carry it"
    assert tiers.after(60, on_first=0.9, on_second=0.9) == (1, 2)
    tiers.running["expert-2-tier1"] = 2
    assert tiers.after(60, on_first=0.2, on_second=0.1) == (1, 1), "one at a time"
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_first=0.2, on_second=0.2) == (1, 0)
    tiers.running["expert-2-tier1"] = 0
    assert tiers.after(60, on_first=0.4) == (1, 0), "it does not come and go"


def test_a_slow_tier_takes_back_what_it_could_carry_and_no_more(monkeypatch):
    """5 % of a GPU's time was all that CPUs could do: they took it back, could not carry it, and lost it again."""
    tiers = Tiers(monkeypatch)
    tiers.running["expert-2"] = 1
    tiers.after(20, on_first=1.0)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(300, on_second=0.05) == (1, 1)
    assert tiers.after(300, on_second=0.03) == (1, 1), "the CPUs would be busy for 0.6 of the time"
    assert tiers.after(1, on_second=0.02) == (1, 0)


def test_a_burst_that_is_over_before_the_other_tier_loads_keeps_no_replica_of_it(monkeypatch):
    """What the burst had been counted as taken by the tier that came after it, so 0.002 was worth 0.8 for good."""
    tiers = Tiers(monkeypatch)
    tiers.running["expert-2"] = 1
    tiers.after(20, on_first=1.0)
    tiers.after(60, on_first=0.25)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(10, on_first=0.2, on_second=0.002) == (1, 1), "it is not known yet what it takes"
    assert tiers.after(60, on_first=0.2, on_second=0.002) == (1, 0)


def test_what_a_tier_takes_is_learned_while_it_has_several_replicas(monkeypatch):
    """It was learned when only one was left, hours after: the load that the tier before had had was another day's."""
    tiers = Tiers(monkeypatch)
    tiers.running["expert-2"] = 1
    tiers.after(20, on_first=1.0)
    tiers.running["expert-2-tier1"] = 2
    tiers.after(60, on_first=0.2, on_second=0.4)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_first=0.1, on_second=0.1) == (1, 0)


def test_a_tier_that_had_more_to_do_than_it_could_takes_its_rows_back_too_early_once(monkeypatch):
    """All of a GPU's time was 5 CPUs'; 3 were asked for, of which one that is busy says 1: each time anew."""
    tiers = Tiers(monkeypatch)
    tiers.running["expert-2"] = 1
    tiers.after(20, on_first=1.0)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_second=0.6) == (1, 1)
    assert tiers.after(60, on_second=0.3) == (1, 0), "0.6 seemed to be worth 1"
    tiers.running["expert-2-tier1"] = 0
    assert tiers.after(20, on_first=1.0) == (1, 1)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_second=0.3) == (1, 1), "0.3 has been worth more than 1"
    assert tiers.after(60, on_second=0.1) == (1, 0)
    tiers.running["expert-2-tier1"] = 0
    tiers.after(20, on_first=1.0)
    tiers.running["expert-2-tier1"] = 1
    assert tiers.after(60, on_second=0.6) == (1, 1)
    assert tiers.after(60, on_second=0.3) == (1, 1), "the same day again"


def test_a_tier_that_begins_with_none_stands_in_for_one_that_has_lost_all(monkeypatch):
    tiers = Tiers(monkeypatch)
    tiers.running["expert-2"] = 1
    tiers.after(5)
    tiers.running["expert-2"] = 0
    assert tiers.after(10)[1] == 0, "Serve may have another one soon"
    assert tiers.after(1)[1] == 1
    tiers.running = dict.fromkeys(tiers.running, 1)
    assert tiers.after(1) == (1, 0)


def test_only_groups_with_such_a_tier_look_at_their_other_tiers():
    one = ScalingConfig()
    assert replica_options(one) == {"num_replicas": 1}
    options = replica_options(one, ("expert-2", "expert-2-tier1"))["autoscaling_config"]
    config = AutoscalingConfig(**options)
    assert (config.min_replicas, config.max_replicas) == (1, 1)
    assert config.policy.policy_kwargs["tiers"] == ["expert-2", "expert-2-tier1"]
    none = replica_options(TierScalingConfig(min_replicas=0, max_replicas=2), ("expert-2", "expert-2-tier1"))
    assert AutoscalingConfig(**none["autoscaling_config"]).min_replicas == 0


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
    assert policy(
        type("Context", (Reported,), {"current_num_replicas": 1, "aggregated_metrics": {LOAD: {"a": 1.2}}})
    ) == (3, {})
