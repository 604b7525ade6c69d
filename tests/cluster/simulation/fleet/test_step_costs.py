"""Costs of steps: the planner's where it has them, and small cases counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.planning.costs import ASSUMED
from cluster.planning.gpus import GPUS, GpuType
from cluster.planning.roofline import Load, Model, attention_s, local_s, prefill_s, wire_s
from cluster.planning.tiers import Cpus, Shard, TieredModel
from cluster.simulation.fleet.popularity import Popularity
from cluster.simulation.fleet.step_costs import (
    SPLIT_ROWS,
    Group,
    Hardware,
    SplitCosts,
    Stations,
    WholeCosts,
    Work,
    _closed,
    cpu_s,
    gpu_s,
    near_s,
    rounded,
)
from experts_service.delivery import replica_load

MODEL = Model.plain(MIXTRAL_8X7B, "bfloat16")
SKEWED = Popularity(32, 8, 2, exponent=1.0).chances()
EVEN = Popularity(32, 8, 2).chances()
WHOLE = replace(ASSUMED.gpu_bandwidth, value=1.0)
HARDWARE = Hardware(GPUS["H200"], ASSUMED, Cpus(50e9, 2e12), ASSUMED.lanes)
EACH = tuple(Group((expert,), MODEL.one_expert_bytes) for expert in range(8))
APART = Stations(tuple((group,) for group in range(8)))


def test_a_row_is_worth_a_replica_of_its_own_where_the_delivery_says_so() -> None:
    assert SPLIT_ROWS == replica_load.SPLIT_ROWS


@pytest.mark.parametrize("sequences", [1, 16, 256])
def test_a_whole_replica_decodes_as_the_planner_says(sequences: int) -> None:
    step_s = WholeCosts(MODEL, HARDWARE, 1).step_s(Work(sequences, 2048), EVEN)
    planned = local_s(MODEL, HARDWARE.reached, Load(sequences, 2048), ASSUMED.captured.value)
    assert step_s == pytest.approx(planned, rel=1e-9)


def test_a_prompt_alone_takes_what_the_planner_says() -> None:
    step_s = WholeCosts(MODEL, HARDWARE, 1).step_s(Work(chunk=2048), EVEN)
    host_s = ASSUMED.layer_s * 32
    assert step_s == pytest.approx(prefill_s(MODEL, HARDWARE.reached, None, 2048, (8,), host_s), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_experts_are_counted_as_tiers_count_them(rows: int) -> None:
    shard = Shard("expert-0", (0, 3), "cuda", 1.0, {}, MODEL.one_expert_bytes, 16)
    chances = tuple(SKEWED[0])
    tiered = TieredModel(MODEL, True, GPUS["H200"], Cpus(50e9, 2e12), (shard,), chances)
    mine = gpu_s(MODEL, HARDWARE.reached, SKEWED[:, (0, 3)], rows, MODEL.one_expert_bytes)
    assert float(mine.sum()) == pytest.approx(tiered.step(Load(rows, 0)).gpu_s, rel=1e-9)
    on_cpu = replace(tiered, shards=(replace(shard, device="cpu"),))
    there = cpu_s(MODEL, HARDWARE.cpus, SKEWED[:, (0, 3)], rows, 16)
    assert float(there.sum()) == pytest.approx(on_cpu.step(Load(rows, 0)).cpu_s, rel=1e-9)


def test_weights_are_read_once_for_a_chunk_beside_decoding_sequences() -> None:
    gpu = GpuType("slow memory", 10**12, 1e9, 1e30)  # nothing counts but bytes
    alone, chunk, both = (near_s(MODEL, gpu, work) for work in (Work(4, 100), Work(chunk=64), Work(4, 100, 64)))
    assert both == pytest.approx(alone + chunk - MODEL.attention_bytes / 1e9)
    assert alone == pytest.approx(attention_s(MODEL, gpu, Load(4, 100)))


def test_by_hand_two_groups_and_one_row() -> None:
    """Bytes count alone: a row asks for 2 of 8 experts, each half has one of them."""
    gpu = GpuType("slow memory", 10**12, 1e9, 1e30)
    hardware = replace(HARDWARE, gpu=gpu, costs=replace(ASSUMED, gpu_bandwidth=WHOLE, step_share=WHOLE))
    halves = (Group((0, 1, 2, 3), MODEL.one_expert_bytes), Group((4, 5, 6, 7), MODEL.one_expert_bytes))
    costs = SplitCosts(MODEL, hardware, halves)
    experts = costs.experts(1, 1, Stations(((0,), (1,))), EVEN, 0, 0.0)
    one_expert_s = MODEL.one_expert_bytes / 1e9
    assert experts.step_s == pytest.approx(one_expert_s), "4 × 1/4 of an expert, both at once"
    assert experts.busy_s == pytest.approx((one_expert_s, one_expert_s))
    on_one_card = costs.experts(1, 1, Stations(((0,), (0,))), EVEN, 0, 0.0)
    assert on_one_card.step_s == pytest.approx(2 * one_expert_s), "they take turns"
    own = costs.own_s(Work(1, 100))
    wire = wire_s(MODEL, hardware.link, 1, (4, 4))
    assert own == pytest.approx(ASSUMED.layer_s * 32 + attention_s(MODEL, hardware.reached, Load(1, 100)) + wire)


def test_a_layer_waits_for_its_slowest_group_and_skew_by_layer_is_not_skew_by_group() -> None:
    rows = 512
    costs = SplitCosts(MODEL, HARDWARE, EACH)
    even, same = (costs.experts(rows, 1, APART, chances, version, 0.0) for version, chances in ((0, EVEN), (1, SKEWED)))
    by_layer = Popularity(32, 8, 2, exponent=1.0, by_layer=True).chances()
    each = costs.experts(rows, 1, APART, by_layer, 2, 0.0)
    assert same.step_s > 1.5 * even.step_s
    assert each.step_s == pytest.approx(same.step_s, rel=1e-6), "some group is as hot in every layer"
    assert max(each.busy_s) < 0.8 * max(same.busy_s), "but none in all of them"


def test_a_second_replica_of_the_hot_group_takes_half_of_many_rows_and_none_of_few() -> None:
    costs = SplitCosts(MODEL, HARDWARE, EACH)
    hot = int(SKEWED[0].argmax())
    two = Stations(tuple((group, 8) if group == hot else (group,) for group in range(8)))
    many = [costs.experts(4096, 1, stations, SKEWED, 0, 0.0) for stations in (APART, two)]
    assert many[1].step_s < 0.8 * many[0].step_s
    assert many[1].busy_s[hot] == pytest.approx(many[0].busy_s[hot] / 2, rel=0.05)
    few = [costs.experts(4, 1, stations, SKEWED, 0, 0.0) for stations in (APART, two)]
    assert few[1].step_s == pytest.approx(few[0].step_s), "one dispatch goes to one replica"
    assert few[1].busy_s[hot] == pytest.approx(few[0].busy_s[hot] / 2), "in turn"


def test_rows_of_coordinators_that_meet_read_weights_once() -> None:
    together, apart = SplitCosts(MODEL, HARDWARE, EACH), SplitCosts(MODEL, HARDWARE, EACH, meet=False)
    other_s = 0.02
    four = together.experts(8, 4, APART, EVEN, 0, other_s)
    one_batch = together.experts(32, 1, APART, EVEN, 0, other_s)
    assert four.step_s == pytest.approx(one_batch.step_s)
    waiting = apart.experts(8, 4, APART, EVEN, 0, other_s)
    assert waiting.queue_s[0] > 0
    assert waiting.busy_s[0] == pytest.approx(4 * apart.experts(8, 1, APART, EVEN, 0, other_s).busy_s[0])


def test_coordinators_that_wait_for_each_other_use_a_station_up_and_no_more() -> None:
    assert _closed(1.0, 0.5, 0.5, 1) == pytest.approx(1.5)
    crowd = _closed(0.1, 1.0, 1.0, 8)
    assert crowd >= 8 * 0.9, "eight of them need eight seconds of it"
    light = _closed(10.0, 0.1, 0.1, 2)
    assert 10.1 < light < 10.102, "they hardly meet"


@pytest.mark.parametrize("number", [0.3, 1, 7.9, 31.4, 1000, 123456.7])
def test_rounding_is_within_3_percent_or_an_eighth(number: float) -> None:
    assert rounded(number) == pytest.approx(number, rel=0.032, abs=0.0626)
    assert rounded(rounded(number)) == rounded(number)


def test_more_rows_never_take_less() -> None:
    costs = SplitCosts(MODEL, HARDWARE, EACH)
    times = [costs.experts(2.0**power, 1, APART, SKEWED, 0, 0.0).step_s for power in range(13)]
    assert times == sorted(times)
    assert np.isfinite(times).all()
