"""Plans: what is chosen, what must hold of every one, and the command that shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.errors import DoesNotFit
from cluster.planning import plan as planning
from cluster.planning.costs import ASSUMED, COPY_S, LANES, LAYER_S, Costs
from cluster.planning.gpus import GPUS, gpu_type
from cluster.planning.placement import plan_groups
from cluster.planning.plan import USABLE, Layout, Planner, Target
from cluster.planning.roofline import Link, Load, Model
from tests.programs import REPOSITORY

NO_HOST = replace(ASSUMED, python=replace(ASSUMED.python, value=0.0), launches=replace(ASSUMED.launches, value=0))
NO_HOST = replace(NO_HOST, captured=replace(ASSUMED.captured, value=0.0))


def planner(gpu: str = "H100", lanes: Link = LANES, costs: Costs = ASSUMED) -> Planner:
    return Planner(Model.plain(MIXTRAL_8X7B, "bfloat16"), gpu_type(gpu), lanes, costs)


@settings(deadline=None, max_examples=40)
@given(
    gpu=st.sampled_from(sorted(GPUS)),
    sequences=st.integers(1, 512),
    context=st.sampled_from([128, 2048, 8192, 32768]),
    milliseconds=st.sampled_from([5.0, 20.0, 50.0, inf]),
    gpus=st.sampled_from([None, 1, 4, 8, 16]),
)
def test_every_plan_holds_the_whole_model_once_and_fits(
    gpu: str, sequences: int, context: int, milliseconds: float, gpus: int | None
) -> None:
    plans = planner(gpu)
    try:
        plan = plans.plan(Target(Load(sequences, context), milliseconds / 1e3, gpus))
    except DoesNotFit:
        return
    held = sum(process.weight_bytes for process in plan.processes)
    if plan.layout.local:
        assert held == plan.layout.coordinators * plans.model.all_bytes
    else:
        assert sorted(expert for group in plan.layout.groups for expert in group.experts) == list(range(8))
        coordinators = plan.layout.coordinators * plans.model.coordinator_bytes
        assert held == 8 * plans.model.one_expert_bytes + coordinators
    cache = sum(process.cache_bytes for process in plan.processes)
    assert cache >= sequences * context * 128 * 1024
    for index in range(plan.layout.gpus):
        held = sum(p.weight_bytes + p.cache_bytes for p in plan.processes if p.gpu == index)
        assert 0 < held <= USABLE * GPUS[gpu].memory_bytes
    assert gpus is None or plan.layout.gpus <= gpus
    assert plan.meets_target == (plan.step_s <= milliseconds / 1e3)
    assert plan.floor_s <= plan.step_s


def test_more_gpus_are_taken_only_for_a_target_that_needs_them() -> None:
    load = Load(32, 2048)
    plans = planner(lanes=Link(100e9, 20e-6), costs=NO_HOST)
    slow, fast = plans.plan(Target(load, 0.1)), plans.plan(Target(load, 0.02))
    assert slow.meets_target
    assert fast.meets_target
    assert slow.layout.gpus < fast.layout.gpus
    never = plans.plan(Target(load, 1e-4))
    assert not never.meets_target


def test_eight_gpus_of_24_gib_hold_one_expert_each_and_the_coordinators_have_their_own() -> None:
    layout = Layout(plan_groups("auto", 8, 8, 1), coordinators=1)
    plan = planner("L4").evaluate(layout, Target(Load(16, 4096)))
    assert plan.layout.gpus == 9
    assert plan.attention_per_expert_gpu == 1 / 8
    assert [process.gpu for process in plan.processes] == list(range(9))
    with pytest.raises(DoesNotFit, match=r"coordinator 0 need .* GiB, and L4 has 20\.12 GiB to use"):
        planner("L4").evaluate(layout, Target(Load(64, 32768)))


@settings(deadline=None, max_examples=30)
@given(
    num_experts=st.integers(2, 14),
    sequences=st.integers(1, 16),
    milliseconds=st.sampled_from([20.0, 50.0, inf]),
    gpu=st.sampled_from(["L4", "H100"]),
)
def test_numbers_of_groups_that_are_left_out_would_not_have_been_chosen(
    num_experts: int, sequences: int, milliseconds: float, gpu: str
) -> None:
    architecture = replace(MIXTRAL_8X7B, num_experts=num_experts, layers=8 * MIXTRAL_8X7B.layers[:1])
    plans = Planner(Model.plain(architecture, "bfloat16"), gpu_type(gpu))
    target = Target(Load(sequences, 2048), milliseconds / 1e3)
    chosen, fewest = plans.plan(target), plans.fewest_gpus(2048)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planning, "_numbers_of_groups", lambda number: list(range(1, number + 1)))
        assert plans.plan(target) == chosen
        assert plans.fewest_gpus(2048) == fewest


@pytest.mark.parametrize(("gpu", "sequences"), [("L4", 16), ("H100", 64), ("A100-80G", 64)])
def test_no_number_of_coordinators_on_the_experts_gpus_is_sooner(gpu: str, sequences: int) -> None:
    """More were not tried once attention took no longer than the experts, which it waits for there: 128 ms, not 115."""
    plans = planner(gpu)
    target = Target(Load(sequences, 4096), step_s=1e-9)
    chosen = plans.plan(target)
    for number in range(1, MIXTRAL_8X7B.num_experts + 1):
        groups = plan_groups("auto", MIXTRAL_8X7B.num_experts, number, 1)
        for coordinators in range(1, number + 1):
            layout = Layout(groups, coordinators, shared=True)
            if plans._fits(layout, target.load):
                assert plans.evaluate(layout, target).step_s >= chosen.step_s


def test_of_a_thousand_experts_few_layouts_are_looked_at() -> None:
    """All numbers of groups were, each with every number of coordinators: a plan took over a minute, and what to do
    where nothing fits half a minute.
    """
    looked_at = 0

    class Counting(Planner):
        def _fits(self, layout: Layout, load: Load) -> bool:
            nonlocal looked_at
            looked_at += 1
            return super()._fits(layout, load)

    architecture = replace(MIXTRAL_8X7B, num_experts=1024, top_k=8, intermediate_size=112)
    plans = Counting(Model.plain(architecture, "bfloat16"), gpu_type("H100"))
    plans.plan(Target(Load(16, 1024)))
    assert 0 < looked_at < 5_000
    looked_at = 0
    assert plans.fewest_gpus(1024) == 2
    assert 0 < looked_at < 500


def test_the_model_does_not_fit_one_small_gpu() -> None:
    """Of 93 GB in bf16 nothing was said but that no layout fits a card of 80."""
    said = r"no layout for 1 sequences of 128 tokens fits 1 of them\. The weights are 86\.99 GiB there \(93 GB\); with "
    said += r"one sequence they fit 8 × A10G, .* 2 × H100, 1 × H200, .*\. --quantization fp8, int8 or int4 makes them "
    said += r"smaller; with --ram some experts are in a CPU's memory$"
    with pytest.raises(DoesNotFit, match=said):
        planner("H100").plan(Target(Load(1, 128), gpus=1))
    assert planner("H200").plan(Target(Load(1, 128), gpus=1)).layout.local


def test_the_rival_is_one_that_manta_can_run_or_is_named_as_not_ours() -> None:
    """It was a replica split over several GPUs at no cost, under a name of ours."""
    groups = plan_groups("auto", 8, 2, 1)
    small, large = (planner(gpu).evaluate(Layout(groups, 1), Target(Load(4, 1024))) for gpu in ("H100", "H200"))
    assert (small.rival, small.rival_gpus) == ("tensor parallelism", 2)
    assert (large.rival, large.rival_gpus) == ("local", 1)
    local = planner("H200").evaluate(Layout((), 1), Target(Load(1, 1024)))
    assert local.rival is None
    assert not local.comparisons
    assert local.step_s == pytest.approx(max(local.host_s, local.attention_s + local.experts_s)), "nothing waits"
    by_number = {one.sequences: one for one in large.comparisons}
    assert by_number[1].rival_step_s == pytest.approx(local.step_s)


def test_what_a_dispatch_costs_is_what_the_page_says_that_it_costs() -> None:
    """242 µs for two groups and 12.5 GB/s were planned with, where 265 and 1.3 to 1.9 had been measured."""
    page = " ".join((REPOSITORY / "docs" / "benchmarks.md").read_text().split())
    measured = re.findall(r"\| (\d) groups? \| (\d+) µs \|", page)
    assert [groups for groups, _ in measured] == ["1", "2", "8"]
    for groups, microseconds in measured:
        assert (LANES.dispatch_s + int(groups) * LANES.group_s) * 1e6 == pytest.approx(float(microseconds), rel=0.1)
    [[fast, slow]] = re.findall(r"a row costs ([\d.]+) to ([\d.]+) µs a group \(8 KB there and 8 KB back", page)
    assert 2 * 8192 / float(slow) < LANES.bandwidth / 1e6 < 2 * 8192 / float(fast)
    [step] = re.findall(r"With next to no weights.{,60}a whole step takes ([\d.]+) ms", page)
    assert 8 * LAYER_S.value * 1e3 == pytest.approx(float(step), rel=0.05), "of a model of 8 layers"


def test_rows_on_gpus_are_copied_at_both_ends_and_a_plan_says_what_is_assumed() -> None:
    link = planner().link
    assert link.bandwidth < LANES.bandwidth
    assert link.dispatch_s == pytest.approx(LANES.dispatch_s + 4 * COPY_S.value)
    assert ASSUMED.between_devices(LANES, gpu_type("H100"), gpus=0) == LANES
    by_pcie_4 = ASSUMED.between_devices(LANES, gpu_type("A100-80G"), gpus=2)
    assert by_pcie_4.bandwidth < link.bandwidth, "NVLink is none of theirs"


def test_splitting_loses_for_few_sequences_and_wins_for_many_where_the_wire_is_fast() -> None:
    """Rows of all coordinators meet at one expert; every rival reads all experts for its own few."""
    fast = replace(planner("A100-80G", costs=NO_HOST), lanes=Link(1e30, 0.0))
    layout = Layout(plan_groups("auto", 8, 8, 1), coordinators=8)
    plan = fast.evaluate(layout, Target(Load(1024, 1024)))
    by_number = {one.sequences: one for one in plan.comparisons}
    assert by_number[1].tokens_per_gpu < by_number[1].rival_tokens_per_gpu
    assert by_number[1024].tokens_per_gpu > by_number[1024].rival_tokens_per_gpu
    assert 1 in plan.loses_at
    assert 1024 not in plan.loses_at


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("manta"), "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_shows_and_prints_the_same_plan() -> None:
    arguments = ("mixtral-8x7b", "--gpu", "H100", "--sequences", "32", "--milliseconds", "80")
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    [plan] = json.loads(run(*arguments, "--json").stdout)
    assert plan["meets_target"]
    assert f"on {plan['layout']['gpus']} × H100" in " ".join(shown.stdout.split())
    assert f"Floor: {plan['floor_s'] * 1e3:.2f} ms" in shown.stdout
    assert f"First token of a prompt of 4096 tokens: {plan['first_token_s'] * 1e3:.2f} ms" in shown.stdout
    words = " ".join(shown.stdout.split())
    measured, assumed = words.split("Measured (")[1].split("Assumed: ")
    for figure in plan["figures"]:
        assert figure["what"] in (measured if figure["measured"] else assumed)
    assert (
        sum(process["name"].startswith("coordinator") for process in plan["processes"])
        == plan["layout"]["coordinators"]
    )


def test_the_layout_of_a_configuration_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    file.write_text(
        "models: [{name: mixtral, path: mistralai/Mixtral-8x7B-Instruct-v0.1, engine: {device: cuda}, "
        "experts: {groups: [[0, 1], [2, 3], [4, 5], [6, 7]], gpus_per_shard: 0.9}}]"
    )
    [plan] = json.loads(run("--config", file, "--gpu", "A100-40G", "--sequences", "8", "--json").stdout)
    assert plan["layout"] == {
        "groups": [[0, 1], [2, 3], [4, 5], [6, 7]], "coordinators": 1, "shared": True, "local": False, "gpus": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-8x7b", "--quantization", "int5"), "engine.quantization: Input should be 'none'"),
        (
            ("TheBloke/mixtral-8x7b-v0.1-AWQ", "--quantization", "int8"),
            "engine.quantization: TheBloke/mixtral-8x7b-v0.1-AWQ is quantised already; leave it out",
        ),
        (("~no_such_user/mixtral",), "'~no_such_user/mixtral' is no directory; shapes that are known by name"),
        (("mixtral-9x9b",), "'mixtral-9x9b' is no directory; shapes that are known by name"),
        (("mixtral-8x7b", "--gpu", "H300"), "there is no GPU type 'H300'"),
        (("mixtral-8x7b", "--gpu", "t4"), "T4: there is nothing to plan for, as it has no bfloat16"),
        ((), "give either MODEL or --config"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
