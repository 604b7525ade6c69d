"""Plans of a machine that was measured: its figures take the place of assumptions, and are told as measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.planning.costs import ASSUMED
from cluster.planning.gpus import GPUS, gpu_type
from cluster.planning.profile import FIGURES, read_profile, sheet_of
from tests.cluster.planning.test_plan import run

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_031_714_816}
MEASURED = {
    "lane_dispatch_s": 60e-6,
    "lane_group_s": 40e-6,
    "lane_bandwidth": 3e9,
    "gpu_bandwidth": 2.9e12,
    "gpu_flops": 6e14,
    "launch_s": 4e-6,
    "layer_s": 150e-6,
    "captured_s": 900e-6,
    "copy_s": 8e-6,
    "copy_bandwidth": 50e9,
}


def written(directory: Path, **changes: Any) -> Path:
    file = directory / "profile.json"
    file.write_text(json.dumps({"manta_profile": 1, "gpu": H100, "figures": MEASURED} | changes))
    return file


def test_what_was_measured_takes_the_place_of_what_is_assumed(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path))
    costs = profile.costs()
    assert profile.gpu == gpu_type("H100")
    assert (costs.lanes.dispatch_s, costs.lanes.group_s, costs.lanes.bandwidth) == (60e-6, 40e-6, 3e9)
    assert costs.layer_s == 150e-6, "launches are in it"
    step, prompt = ASSUMED.step_share.value, ASSUMED.prompt_share.value  # of what a card can, and nobody measures
    assert costs.reached(GPUS["H100"]).bandwidth == pytest.approx(2.9e12 * step)
    assert costs.reached(GPUS["H200"]).flops == pytest.approx(6e14 * prompt), "another one's share of its data sheet"
    assert costs.hop == ASSUMED.hop
    assert all(one.measured for one in (*costs.of_gpus, *costs.of_lanes, *costs.of_copies, *costs.of_steps))


def test_the_command_says_what_was_measured_where(tmp_path: Path) -> None:
    file = written(tmp_path)
    arguments = ("mixtral-8x7b", "--sequences", "8", "--profile", file)
    [plan] = json.loads(run(*arguments, "--json").stdout)
    [assumed] = json.loads(run(*arguments[:3], "--json").stdout)
    assert plan["gpu"]["name"] == "H100", "the machine's own"
    assert not plan["layout"]["local"]
    assert plan["host_s"] == pytest.approx(32 * 150e-6)
    assert plan["step_s"] < assumed["step_s"]
    sources = {figure["what"]: figure["source"] for figure in plan["figures"] if figure["measured"]}
    assert sources["2900 GB/s from the GPU's memory"] == str(file)
    assert [figure["what"] for figure in plan["figures"] if not figure["measured"]] == (
        [ASSUMED.hop.what] if plan["rival"] == "tensor parallelism" else []
    )


def test_a_machine_without_a_gpu_has_lanes_and_memory(tmp_path: Path) -> None:
    file = written(tmp_path, gpu=None, figures={"lane_dispatch_s": 60e-6, "cpu_bandwidth": 25e9})
    profile = read_profile(file)
    assert profile.gpu is None
    assert profile.costs().gpu_bandwidth == ASSUMED.gpu_bandwidth
    done = run("mixtral-8x7b", "--gpu-memory", "24GB", "--ram", "128GB", "--profile", file, "--json")
    [plan] = json.loads(done.stdout)
    by_what = {figure["what"]: figure["measured"] for figure in plan["figures"]}
    assert by_what["25 GB/s from the CPU's memory"]
    assert not by_what["8 cores"]


def test_a_card_without_a_data_sheet_is_planned_for_as_it_was_measured(tmp_path: Path) -> None:
    card = {"name": "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "memory_bytes": 42e9}
    profile = read_profile(written(tmp_path, gpu=card))
    assert profile.gpu is not None
    assert profile.costs().reached(profile.gpu).bandwidth == pytest.approx(
        MEASURED["gpu_bandwidth"] * ASSUMED.step_share.value
    )


@pytest.mark.parametrize(
    ("name", "gigabytes", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 85, "A100-80G"),
        ("NVIDIA A100-SXM4-40GB", 42, "A100-40G"),
        ("NVIDIA L4", 24, "L4"),
        ("NVIDIA L40S", 48, "L40S"),
        ("NVIDIA GH200 480GB", 96, None),
        ("NVIDIA GeForce RTX 4090", 24, None),
    ],
)
def test_a_card_is_known_by_the_drivers_name(name: str, gigabytes: int, known: str | None) -> None:
    sheet = sheet_of(name, gigabytes * 10**9)
    assert (None if sheet is None else sheet.name) == known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manta_profile": 2}, "is no profile of version 1"),
        ({"figures": []}, "figures: expected an object"),
        ({"figures": {"speed": 1}}, r"figures\.speed is unknown; known are lane_dispatch_s"),
        ({"figures": {"copy_s": -1}}, r"figures\.copy_s: expected a positive number"),
        ({"figures": {"copy_s": float("nan")}}, r"figures\.copy_s: expected a positive number"),
        ({"figures": {"copy_s": True}}, r"figures\.copy_s: expected a positive number"),
        ({"gpu": "H100"}, "gpu: expected name and memory_bytes"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_profile(written(tmp_path, **changes))


def test_nothing_but_a_profile_is_read(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(file)
    assert set(MEASURED) <= set(FIGURES)
