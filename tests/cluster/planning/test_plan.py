"""Plans: what is chosen, what must hold of every one, and the command that shows them."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.errors import DoesNotFit
from cluster.planning.gpus import GPUS, gpu_type
from cluster.planning.placement import plan_groups
from cluster.planning.plan import USABLE, Layout, Planner, Target
from cluster.planning.roofline import Link, Load, Model

LINK = Link(12.5e9, 130e-6, 56e-6)


def planner(gpu: str = "H100", link: Link = LINK) -> Planner:
    return Planner(Model(MIXTRAL_8X7B, "bfloat16"), gpu_type(gpu), link)


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
    assert sorted(expert for group in plan.layout.groups for expert in group.experts) == list(range(8))
    experts = sum(process.weight_bytes for process in plan.processes if process.name.startswith("expert"))
    assert experts == 8 * plans.model.one_expert_bytes
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
    plans = planner(link=Link(100e9, 20e-6))
    slow, fast = plans.plan(Target(load, 0.1)), plans.plan(Target(load, 0.009))
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


def test_the_model_does_not_fit_one_small_gpu() -> None:
    with pytest.raises(DoesNotFit, match="no layout for 1 sequences of 128 tokens fits 1 of them"):
        planner("H100").plan(Target(Load(1, 128), gpus=1))
    assert planner("H200").plan(Target(Load(1, 128), gpus=1)).layout.shared


def test_splitting_loses_for_few_sequences_and_wins_for_many_where_the_wire_is_fast() -> None:
    """Rows of all coordinators meet at one expert; every fat replica reads all experts for its own few."""
    fast = planner("A100-80G", Link(400e9, 5e-6))
    layout = Layout(plan_groups("auto", 8, 8, 1), coordinators=8)
    plan = fast.evaluate(layout, Target(Load(1024, 1024)))
    by_number = {one.sequences: one for one in plan.comparisons}
    assert by_number[1].tokens_per_gpu < by_number[1].replica_tokens_per_gpu
    assert by_number[1024].tokens_per_gpu > by_number[1024].replica_tokens_per_gpu
    assert plan.loses_until is not None
    assert 1 <= plan.loses_until < 1024


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("manta"), "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_shows_and_prints_the_same_plan() -> None:
    arguments = ("mixtral-8x7b", "--gpu", "H100", "--sequences", "32", "--milliseconds", "40")
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    [plan] = json.loads(run(*arguments, "--json").stdout)
    assert plan["meets_target"]
    assert f"on {plan['layout']['gpus']} × H100" in " ".join(shown.stdout.split())
    assert f"Floor: {plan['floor_s'] * 1e3:.2f} ms" in shown.stdout
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
        "groups": [[0, 1], [2, 3], [4, 5], [6, 7]], "coordinators": 1, "shared": True, "gpus": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-9x9b",), "'mixtral-9x9b' is no directory; shapes that are known by name"),
        (("mixtral-8x7b", "--gpu", "H300"), "there is no GPU type 'H300'"),
        ((), "give either MODEL or --config"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
