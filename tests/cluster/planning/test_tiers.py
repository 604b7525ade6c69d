"""Experts on GPUs and CPUs: which formats are chosen, and a step's time against numbers worked out by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.architecture import LayerSpec
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.planning.costs import ASSUMED, CORE_FLOPS, LANES, kernel_speed
from cluster.planning.gpus import gpu_type
from cluster.planning.hot_experts import QUALITY, splits
from cluster.planning.plan import Layout, Planner, Target
from cluster.planning.roofline import Load, Model, attention_s
from cluster.planning.tiers import Cpus, Shard, TieredModel, chances
from tests.programs import REPOSITORY

MODEL = Model.plain(MIXTRAL_8X7B, "bfloat16")
ONE = MODEL.one_expert_bytes
L4 = gpu_type("L4")
CPUS = Cpus(40e9, 8 * CORE_FLOPS.value)
GPU_SHARD = Shard("expert-0", (0,), "cuda", 0.9, {}, ONE, 16)
CPU_SHARD = Shard("expert-1", tuple(range(1, 8)), "cpu", 0.0, {}, ONE // 2, 8)
ALIKE = chances(None, 8, 2)
PAGE = " ".join((REPOSITORY / "docs" / "benchmarks.md").read_text().split())


def tiered(*shards: Shard, **changes: object) -> TieredModel:
    return replace(TieredModel(MODEL, True, L4, CPUS, shards, ALIKE), **changes)


def test_a_step_waits_for_the_slower_side() -> None:
    times = tiered(GPU_SHARD, CPU_SHARD).step(Load(1, 1000))
    assert times.attention_s == pytest.approx(attention_s(MODEL, ASSUMED.reached(L4), Load(1, 1000)))
    assert times.gpu_s == pytest.approx(0.25 * ONE / ASSUMED.reached(L4).bandwidth)
    assert times.cpu_s == pytest.approx(7 * 0.25 * ONE / 40e9 / 1.77), "what bf16 would take, by the measured gain"
    assert times.host_s == pytest.approx(32 * ASSUMED.layer_s)
    assert times.all_s == pytest.approx(times.attention_s + times.cpu_s + times.wire_s + times.host_s)


def test_a_hot_expert_on_the_card_takes_its_rows_from_the_cpu() -> None:
    hot = chances((70, 10, 10, 2, 2, 2, 2, 2), 8, 2)
    assert hot[0] == 1.0, "a row asks for it once, however hot it is"
    alike, hotter = (tiered(GPU_SHARD, CPU_SHARD, chances=one).step(Load(1, 1000)) for one in (ALIKE, hot))
    assert hotter.cpu_s < alike.cpu_s / 2
    assert hotter.gpu_s == pytest.approx(4 * alike.gpu_s)


def test_groups_of_one_machine_share_its_memory_and_those_of_two_do_not() -> None:
    halves = [replace(CPU_SHARD, name=f"expert-{n}", experts=tuple(range(4 * n, 4 * n + 4))) for n in (0, 1)]
    together = tiered(*halves).step(Load(1, 1000)).cpu_s
    apart = tiered(halves[0], replace(halves[1], machine={"tier": "other"})).step(Load(1, 1000)).cpu_s
    assert together == pytest.approx(2 * apart)


def test_cards_work_at_once_and_halves_of_one_take_turns() -> None:
    halves = [replace(GPU_SHARD, experts=tuple(range(4 * n, 4 * n + 4)), gpus=0.5) for n in (0, 1)]
    whole = [replace(one, gpus=1.0) for one in halves]
    four_on_one = tiered(*halves, *halves).step(Load(1, 1000)).gpu_s
    assert four_on_one == pytest.approx(2 * tiered(*whole).step(Load(1, 1000)).gpu_s)


def test_rows_that_go_to_a_card_are_copied_twice_more_and_local_ones_go_nowhere() -> None:
    on_cpu = replace(GPU_SHARD, device="cpu", gpus=0.0)
    assert tiered(GPU_SHARD).step(Load(1, 1)).wire_s > tiered(on_cpu).step(Load(1, 1)).wire_s
    assert tiered(GPU_SHARD, lanes=None).step(Load(1, 1)).wire_s == 0.0
    bare = tiered(on_cpu, on_gpu=False).step(Load(1, 1)).wire_s
    asked = 0.25
    rows = 2 * asked * 4096 * 2 / LANES.bandwidth
    assert bare == pytest.approx(32 * (LANES.dispatch_s + asked * LANES.group_s + rows))


def test_rows_to_cpus_of_the_same_machine_lie_in_memory_of_both() -> None:
    """A plan counted what a lane carries, a third of it. The rest of a dispatch takes as long either way."""
    over_lane = replace(CPU_SHARD, gpus=0.0)
    through_memory = replace(over_lane, shares_memory=True)
    lane, memory = (tiered(one, on_gpu=False).step(Load(64, 1)).wire_s for one in (over_lane, through_memory))
    chance = min(1.0, 0.25 * len(CPU_SHARD.experts))
    sent = 32 * 2 * 64 * chance * 4096 * 2
    assert lane - memory == pytest.approx(sent / LANES.bandwidth - sent / ASSUMED.memory_bandwidth.value)
    [us] = re.findall(r"([\d.]+) µs a row and group", PAGE)
    assert ASSUMED.memory_bandwidth.value == pytest.approx(2 * 4096 * 2 / (float(us) * 1e-6), rel=0.01)


def test_rows_of_a_layer_without_experts_stay_where_they_are() -> None:
    """Of Qwen2-MoE's dense layers a plan counted dispatches as well."""
    layers = MIXTRAL_8X7B.layers
    half = replace(MIXTRAL_8X7B, layers=layers[:16] + 16 * (LayerSpec(dense_size=14336),))
    all_of_them, sixteen = (
        tiered(GPU_SHARD, CPU_SHARD, model=Model.plain(one, "bfloat16")).step(Load(4, 1000)).wire_s
        for one in (MIXTRAL_8X7B, half)
    )
    assert sixteen == pytest.approx(all_of_them / 2)


def test_where_all_experts_are_in_the_coordinator_its_host_goes_ahead_of_its_card() -> None:
    local = tiered(GPU_SHARD, lanes=None).step(Load(1, 1))
    assert local.all_s == pytest.approx(max(local.host_s, local.attention_s + local.gpu_s))
    assert not local.waits
    assert tiered(GPU_SHARD, lanes=None, on_gpu=False).step(Load(1, 1)).waits


def test_a_prompt_on_cpus_is_bound_by_their_cores() -> None:
    seconds = tiered(GPU_SHARD, CPU_SHARD).first_token_s(4096)
    computed = 2 * 4096 * 2 * 7 / 8 * MODEL.one_expert_parameters / CPUS.flops
    assert computed < seconds < 1.2 * computed


def test_a_prompt_on_a_card_is_launched_one_by_one_as_the_plan_of_cards_alone_has_it() -> None:
    """It was as fast as a CUDA graph: 1.7 ms for the 30 of Python and launches."""
    model = Model.plain(replace(MIXTRAL_8X7B, hidden_size=64, intermediate_size=128, vocab_size=512), "bfloat16")
    shard = replace(GPU_SHARD, experts=tuple(range(8)), expert_bytes=model.one_expert_bytes)
    plan = Planner(model, L4).evaluate(Layout((), 1), Target(Load(1, 16)))
    assert plan.first_token_s == pytest.approx(32 * ASSUMED.layer_s)
    assert tiered(shard, model=model, lanes=None).first_token_s(16) == pytest.approx(plan.first_token_s)


def test_how_much_faster_small_numbers_are_is_what_the_page_says() -> None:
    for bits, row in ((8, "int8, groups of 128"), (4, "int4, groups of 128")):
        [measured] = re.findall(
            rf"\| {row} \| [\d.]+× \| ([\d.]+)× \| [\d.]+× \| ([\d.]+)× \| [\d.]+× \| ([\d.]+)×", PAGE
        )
        assert tuple(kernel_speed(bits, rows) for rows in (1, 4, 16)) == tuple(map(float, measured))
        assert kernel_speed(bits, 0.5) == kernel_speed(bits, 3) == float(measured[0])
    assert kernel_speed(16, 1) == 1.0
    [flops] = re.findall(r"with 192 rows `dot` (\d+)", PAGE)
    assert CORE_FLOPS.value == 2e9 * float(flops)


HELD = {("cuda", "none"): 100, ("cuda", "int8"): 100, ("cpu", "none"): 100, ("cpu", "int8"): 50, ("cpu", "int4"): 27}
FORMATS = {**HELD, ("cuda", "fp8"): 50, ("cpu", "fp8"): 100}


def test_the_best_quality_that_fits_comes_first_and_the_most_used_experts_are_on_the_card() -> None:
    by_use = (5, 2, 0, 1, 3, 4, 6, 7)
    first, second = splits(by_use, 1, 250, 300, HELD)
    assert (first.on_gpus, first.on_cpus) == (((2, 5),), (0, 1, 3, 4, 6, 7))
    assert [(one.gpu_format, one.cpu_format) for one in (first, second)] == [("none", "int8"), ("none", "int4")]
    assert next(splits(by_use, 1, 250, 600, HELD)).cpu_format == "none"
    assert next(splits(by_use, 2, 199, 300, HELD)).on_gpus == ((5,), (2,)), "each card has as many as the others"
    assert not list(splits(by_use, 1, 250, 100, HELD))
    assert next(splits(by_use, 1, 50, 800, HELD)).on_gpus == ()


def test_a_format_that_a_device_does_not_hold_smaller_is_none_for_it() -> None:
    found = list(splits(range(8), 1, 800, 0, FORMATS))
    assert [(one.gpu_format, one.cpu_format, len(one.on_cpus)) for one in found] == [
        ("none", "none", 0),
        ("fp8", "none", 0),
    ]
    both = list(splits(range(8), 1, 400, 220, FORMATS))
    assert ("fp8", "none") in [(one.gpu_format, one.cpu_format) for one in both]
    assert all(one.gpu_format != "int8" and one.cpu_format != "fp8" for one in both)


@given(
    cards=st.integers(1, 4),
    card=st.floats(0, 1000),
    ram=st.floats(0, 1000),
    by_use=st.permutations(range(8)),
)
def test_every_split_has_every_expert_once_and_fits(cards: int, card: float, ram: float, by_use: list[int]) -> None:
    previous = 0
    for one in splits(by_use, cards, card, ram, FORMATS):
        assert sorted(expert for group in (*one.on_gpus, one.on_cpus) for expert in group) == list(range(8))
        assert all(len(group) * FORMATS["cuda", one.gpu_format] <= card for group in one.on_gpus)
        assert len(one.on_cpus) * FORMATS["cpu", one.cpu_format] <= ram
        worst = max(QUALITY.index(one.gpu_format), QUALITY.index(one.cpu_format))
        assert worst >= previous
        previous = worst
        hottest = [by_use.index(expert) for group in one.on_gpus for expert in group]
        assert sorted(hottest) == list(range(len(hottest)))
