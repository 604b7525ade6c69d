"""`manta simulate` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.planning.test_plan import run as run_plan
from tests.programs import REPOSITORY

H100 = REPOSITORY / "docs" / "profiles" / "h100.json"  # H100 80GB, torch 2.11
QUICK = ("--synthetic", "rate=1,hours=0.2,prompt=200,output=50", "--warm-up", "60")


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "simulate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


def test_four_ways_are_compared_on_the_card_that_was_measured() -> None:
    shown = run("mixtral-8x7b", "--quantization", "fp8", "--profile", H100, *QUICK).stdout
    for part in (
        "(a) whole model",
        "(b) experts together",
        "(c) one by one",
        "(d) tiers",
        "Least GPU time",
        "expert-7",
    ):
        assert part in shown
    assert "Measured: 2983 GB/s from the GPU's memory" in shown
    assert "Assumed: " in shown


def test_the_same_seed_prints_the_same_bytes_and_another_one_others() -> None:
    arguments = ("mixtral-8x7b", "--popularity", "zipf:1:layers:drift=1", "--json", *QUICK)
    first, again, other = run(*arguments), run(*arguments), run(*arguments, "--seed", "1")
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout
    document = json.loads(first.stdout)
    for one in document["variants"]:
        assert one["finished"] + one["shed"] + one["failed"] == one["requests"]


def test_a_trace_and_a_configuration_are_read_and_a_plot_is_drawn(tmp_path: Path) -> None:
    trace, config, plot = tmp_path / "trace.csv", tmp_path / "manta.yaml", tmp_path / "fleet.svg"
    rows = "\n".join(f"2023-11-16 18:{at // 60:02}:{at % 60:02}.5,{200 + at},20" for at in range(600))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    config.write_text(
        "models: [{name: mix, path: mixtral-8x7b, experts: {groups: [[0, 1, 2, 3], [4, 5, 6, 7]], gpus_per_shard: 1}}]"
    )
    arguments = (config, "--trace", trace, "--variants", "single", "--json", "--plot", plot, "--warm-up", 0)
    [single] = json.loads(run(*arguments).stdout)["variants"]
    assert single["requests"] == 600
    assert single["shards"] == ["expert-0", "expert-1"]
    drawn = plot.read_bytes()
    assert b"GPU-seconds per 1,000 good tokens" in drawn
    run(*arguments)
    assert plot.read_bytes() == drawn, "the same seed draws the same"


def test_a_trace_that_ends_within_the_warm_up_says_that_nobody_is_counted(tmp_path: Path) -> None:
    """It said "–" of who is good and 0 good tokens/s, and not why."""
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(f"{at},200,20" for at in range(60)))
    arguments = ("mixtral-8x7b", "--trace", trace, "--variants", "single")
    said = "Nobody arrives after the warm-up of 120 s, so nobody is counted: --warm-up 0 counts everybody."
    assert said in " ".join(run(*arguments, "--warm-up", 120).stdout.split())
    [single] = json.loads(run(*arguments, "--warm-up", 120, "--json").stdout)["variants"]
    assert single["requests"] == 0
    assert single["goodput_tokens_per_s"] is None, "of nobody there is none, and not 0"


def test_experts_on_cpus_need_no_gpu() -> None:
    document = json.loads(run("demo", "--gpu", "cpu", "--variants", "single", "--json", *QUICK).stdout)
    assert document["variants"][0]["gpu_hours"] == 0
    assert document["variants"][0]["good"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-8x7b",), "either --trace FILE or --synthetic"),
        (("mixtral-8x7b", "--synthetic", "rats=1"), "'rats' is unknown"),
        (("mixtral-8x7b", "--synthetic", "", "--popularity", "zapf:1"), "--popularity"),
        (("mixtral-8x7b", "--synthetic", "", "--variants", "halves"), "'halves' is unknown"),
        (("mixtral-8x22b", "--synthetic", "", "--gpu", "L4", "--variants", "single"), "L4"),
        (("nothing-like-it", "--synthetic", ""), "is no directory"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_neither_torch_nor_ray_is_imported() -> None:
    program = """
import sys
sys.argv = ["manta", "simulate", "mixtral-8x7b", "--synthetic", "rate=1,hours=0.05", "--variants", "single", "--json"]
from cluster.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
assert not {"torch", "ray", "transformers"} & set(sys.modules), "it starts in a moment"
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


def test_manta_plan_says_that_a_fleet_can_be_simulated() -> None:
    assert "manta simulate" in run_plan("mixtral-8x7b", "--gpu", "L4").stdout
