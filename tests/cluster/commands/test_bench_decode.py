"""`manta bench decode`: its arithmetic, and a whole run on the embedded demo model beside transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.checkpoint.architecture import all_tensors
from cluster.cli import app
from cluster.commands.bench import machine
from cluster.commands.bench.decode import reference
from cluster.commands.bench.decode.figures import (
    DecodeResult,
    PrefillResult,
    Rival,
    Run,
    Workload,
    bytes_per_step,
    equal_share,
)
from cluster.commands.bench.shapes import BENCH, num_parameters


def run_of(step_ms: float, prefill_ms: float = 100.0, tokens: list[list[int]] | None = None) -> Run:
    return Run(prefill_s=prefill_ms / 1e3, decode_s=10 * step_ms / 1e3, decode_steps=10, token_ids=tokens or [[1, 2]])


def test_bytes_of_a_step_are_all_weights_but_idle_experts_and_embeddings() -> None:
    """459 MB at batch 1, which is the floor of 14.8 ms at 31 GB/s that the design reckons with."""
    assert bytes_per_step(BENCH, 2, 1, 8 * 2) / 31e9 == pytest.approx(14.8e-3, rel=0.01)
    everything = 2 * num_parameters(BENCH)
    assert bytes_per_step(BENCH, 2, 1, 8 * 8) == everything - 2 * (BENCH.vocab_size - 1) * BENCH.hidden_size
    tied = replace(BENCH, tie_word_embeddings=True)
    assert "lm_head.weight" not in all_tensors(tied)
    assert bytes_per_step(tied, 2, 1, 8 * 8) == 2 * num_parameters(tied)


def test_medians_floor_and_speed_up() -> None:
    ours = tuple(map(run_of, (40.0, 10.0, 20.0)))
    theirs = tuple(map(run_of, (30.0, 90.0, 10.0)))
    result = DecodeResult(Workload(4, 8, 11), ours, 1e9, 1e11, Rival(theirs, "eager", "sdpa")).to_json()
    assert (result["ms_per_step"], result["transformers_ms_per_step"], result["speedup"]) == (20.0, 30.0, 1.5)
    assert (result["tokens_per_s"], result["floor_ms"], result["floor_fraction"]) == (200.0, 10.0, 0.5)
    assert result["ms_per_step_of_runs"] == [40.0, 10.0, 20.0]
    prefill = PrefillResult(Workload(2, 50, 1), ours, Rival(theirs, "eager", "sdpa")).to_json()
    assert (prefill["tokens_per_s"], prefill["speedup"]) == (1000.0, 1.0)


def test_equal_share_counts_up_to_the_first_difference() -> None:
    assert equal_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert equal_share([[1, 2], [3, 4]], [[1, 2], [9, 4]]) == 0.5


def test_a_run_on_the_demo_model_ends_in_its_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    monkeypatch.setattr(reference, "OPENMP_SETTINGS", ({},))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of transformers' process: tests share the cores with others
    options = "--batch 1 --batch 3 --prompt-tokens 8 --output-tokens 3 --pairs 2 --no-prefill --dtype float32"
    result = CliRunner().invoke(
        app, ["bench", "decode", *options.split(), "--compare", "transformers", "--groups", "2"]
    )
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["bench"], line["transport"], line["groups"], line["prefill"]) == ("decode", "local", 2, [])
    assert [row["batch"] for row in line["results"]] == [1, 3]
    for row in line["results"]:
        assert len(row["ms_per_step_of_runs"]) == len(row["transformers_ms_per_step_of_runs"]) == 2
        assert row["equal_tokens"] == 1.0  # in fp32 both generate the same
        assert 0 < row["floor_ms"] < row["ms_per_step"]
    # 4 layers of 8 experts, 2 a row: batch 1 reads exactly 8 of 32 in every step, batch 3 more
    assert line["results"][0]["bytes_per_step"] < line["results"][1]["bytes_per_step"]
    assert "of the floor" in result.stdout


@pytest.mark.long
def test_experts_in_processes_of_their_own() -> None:
    """In a process of its own, as it starts a Ray. The deployments were once looked for where they no longer were."""
    command = [Path(sys.executable).with_name("manta"), "bench", "decode", "--transport", "lane", "--groups", "2"]
    options = "--batch 1 --prompt-tokens 4 --output-tokens 3 --pairs 1 --no-prefill"
    done = subprocess.run([*command, *options.split()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["transport"], line["groups"], [row["batch"] for row in line["results"]]) == ("lane", 2, [1])


def test_prefill_is_timed_without_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = "--batch 1 --prompt-tokens 4 --output-tokens 2 --pairs 1"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert [(row["sequences"], row["prompt_tokens"]) for row in line["prefill"]] == [(16, 64), (1, 2048)]
    assert all(row["ms"] > 0 for row in line["prefill"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [("--groups 9", "8 experts"), ("--prompt-tokens 40000", "context is 32768")],
)
def test_what_cannot_be_measured_is_said_first(options: str, sentence: str) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code != 0
    assert sentence in str(result.exception)
