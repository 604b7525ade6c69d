"""`manta bench decode`: its arithmetic, and a whole run on the embedded demo model beside transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from cluster.checkpoint.architecture import LayerSpec, all_tensors
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.cli import app
from cluster.commands.bench import machine
from cluster.commands.bench.decode import reference
from cluster.commands.bench.decode.context import Contexts
from cluster.commands.bench.decode.cores import Cores
from cluster.commands.bench.decode.engine import CountingDispatcher, EngineUnderTest
from cluster.commands.bench.decode.experts import local_experts
from cluster.commands.bench.decode.figures import (
    DecodeResult,
    PrefillResult,
    Rival,
    Run,
    Workload,
    equal_share,
    kv_bytes_per_step,
    weight_bytes_per_step,
)
from cluster.commands.bench.decode.setup import _gpus_per_shard
from cluster.commands.bench.memory import resident_memory
from cluster.commands.bench.shapes import BENCH, num_parameters
from cluster.config import EngineConfig
from cluster.planning.placement import ExpertGroup, WeightBytes
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def run_of(step_ms: float, prefill_ms: float = 100.0, tokens: list[list[int]] | None = None) -> Run:
    return Run(prefill_s=prefill_ms / 1e3, decode_s=10 * step_ms / 1e3, decode_steps=10, token_ids=tokens or [[1, 2]])


def test_bytes_of_a_step_are_all_weights_but_idle_experts_and_embeddings() -> None:
    """459 MB at batch 1, which is the floor of 14.8 ms at 31 GB/s that the design reckons with."""
    held = WeightBytes.of(BENCH, "bfloat16")
    assert weight_bytes_per_step(BENCH, held, 2, 1, 8 * 2) / 31e9 == pytest.approx(14.8e-3, rel=0.01)
    everything = 2 * num_parameters(BENCH)
    idle = 2 * (BENCH.vocab_size - 1) * BENCH.hidden_size
    assert weight_bytes_per_step(BENCH, held, 2, 1, 8 * 8) == everything - idle
    tied = replace(BENCH, tie_word_embeddings=True)
    assert "lm_head.weight" not in all_tensors(tied)
    held = WeightBytes.of(tied, "bfloat16")
    assert weight_bytes_per_step(tied, held, 2, 1, 8 * 8) == 2 * num_parameters(tied)
    half = replace(tied, layers=tied.layers[:4] + 4 * (LayerSpec(dense_size=3584),))
    held = WeightBytes.of(half, "bfloat16")
    assert weight_bytes_per_step(half, held, 2, 1, 4 * 8) == 2 * num_parameters(half), "where half have experts"


def test_keys_and_values_of_a_step_are_those_of_the_whole_context_or_window() -> None:
    workload = Workload.after_context(2, 100, 3)  # 101 prompt tokens; the two decode steps see 102 and 103
    assert kv_bytes_per_step(workload, 8, None) == 2 * 8 * 102.5
    assert kv_bytes_per_step(workload, 8, 50) == 2 * 8 * 50


def test_medians_floor_and_speed_up() -> None:
    ours = tuple(map(run_of, (40.0, 10.0, 20.0)))
    theirs = tuple(map(run_of, (30.0, 90.0, 10.0)))
    rivals = (Rival("transformers", theirs, "eager, sdpa"),)
    result = DecodeResult(Workload(4, 8, 11), ours, 0.75e9, 0.25e9, 1e11, rivals).to_json()
    [rival] = result["rivals"]
    assert (result["ms_per_step"], rival["ms_per_step"], rival["speedup"]) == (20.0, 30.0, 1.5)
    assert (result["tokens_per_s"], result["floor_ms"], result["floor_fraction"]) == (200.0, 10.0, 0.5)
    assert (result["bytes_per_step"], result["kv_bytes_per_step"]) == (1e9, 0.25e9)
    assert result["ms_per_step_of_runs"] == [40.0, 10.0, 20.0]
    prefill = PrefillResult(Workload(2, 50, 1), ours, 10, 20, rivals).to_json()
    assert (prefill["tokens_per_s"], prefill["rivals"][0]["speedup"]) == (1000.0, 1.0)


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
        [rival] = row["rivals"]
        assert len(row["ms_per_step_of_runs"]) == len(rival["ms_per_step_of_runs"]) == 2
        assert rival["equal_tokens"] == 1.0  # in fp32 both generate the same
        assert 0 < row["floor_ms"] < row["ms_per_step"]
    # 4 layers of 8 experts, 2 a row: batch 1 reads exactly 8 of 32 in every step, batch 3 more
    assert line["results"][0]["bytes_per_step"] < line["results"][1]["bytes_per_step"]
    assert "of the floor" in result.stdout
    assert line["kernels"]["linear"] == "torch"  # fp32 stays what it is
    [loading] = line["loading"]
    assert loading["weights"] == "float32"
    assert loading["s"] > 0


def test_a_context_is_in_the_cache_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = "--batch 2 --context 30 --context 300 --output-tokens 3 --pairs 1"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    short, long = line["results"]
    assert (short["context"], long["context"], line["prefill"]) == (30, 300, [])
    bytes_of_token = 2 * 4 * 2 * 32 * 2  # keys and values, 4 layers, 2 heads of 32, bf16
    assert short["kv_bytes_per_step"] == 2 * 32.5 * bytes_of_token
    assert long["kv_bytes_per_step"] == 2 * 302.5 * bytes_of_token


@pytest.mark.long
def test_quantised_weights_run_in_turn_with_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each, and each reads what its kernels hold."""
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = (
        "--batch 1 --output-tokens 3 --pairs 2 --prefill 2x8 --quantization none --quantization int8 --quantization fp8"
    )
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert line["model"] == "demo_model", "it was the name of what its weights are"
    plain, *rounded = line["results"]
    assert [row["weights"] for row in line["results"]] == ["bfloat16", "int8", "fp8"]
    for row in rounded:  # FP8 leaves the head in bf16
        assert 0.5 < row["bytes_per_step"] / plain["bytes_per_step"] < 0.7
    assert [len(row["ms_per_step_of_runs"]) for row in line["results"]] == [2, 2, 2]
    assert [row["weights"] for row in line["prefill"]] == ["bfloat16", "int8", "fp8"]
    refused = CliRunner().invoke(app, ["bench", "decode", "--quantization", "int8", "--transport", "lane"])
    assert refused.exit_code == 1
    assert str(refused.exception) == "--quantization is measured with --transport local"


def test_keys_and_values_in_8_bits_run_in_turn_with_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the floor counts what each reads: 32 bytes and a scale of four for a head's 32 numbers of two."""
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = "--batch 2 --context 300 --output-tokens 3 --pairs 1 --kv-cache-dtype auto --kv-cache-dtype int8"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    plain, narrow = line["results"]
    assert [row["weights"] for row in (plain, narrow)] == ["bfloat16", "bfloat16, keys and values int8"]
    assert narrow["kv_bytes_per_step"] / plain["kv_bytes_per_step"] == 36 / 64
    assert narrow["ms_per_step"] > 0


@pytest.mark.long
def test_transformers_begins_with_as_much_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random in each engine, so that tokens cannot be compared."""
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    monkeypatch.setattr(reference, "OPENMP_SETTINGS", ({},))
    options = "--batch 2 --context 30 --output-tokens 3 --pairs 1 --compare transformers"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout.splitlines()[-1])["results"]
    [rival] = row["rivals"]
    assert rival["ms_per_step"] > 0
    assert "equal_tokens" not in rival


def test_sequences_find_their_filled_context_and_compute_only_what_is_left(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    bench = Bench(tmp_path, block_size=16)
    contexts = Contexts(bench.engine)
    prompts = [[5 + number, *range(6, 75)] for number in range(3)]  # 70 tokens: four blocks and a rest
    for _ in range(2):  # what is there is not filled again
        contexts.fill(prompts)
        assert bench.engine.scheduler.block_manager.num_used_blocks == 0
    requests = [make_request(prompt, max_tokens=4, ignore_eos=True) for prompt in prompts]
    outputs = bench.run(*requests)
    stats = bench.engine.stats()
    assert (stats.prefix_cache_hit_tokens_total, stats.prompt_tokens_total) == (3 * 64, 3 * 6)
    assert bench.errors == {}  # finite, so every sequence has its tokens
    assert [len(output) for output in outputs] == [4, 4, 4]


def test_experts_of_a_step_are_counted_without_graphs_which_are_captured_afterwards(tmp_path: Path) -> None:
    """A replayed step runs no Python. Nothing was counted, and counting in a step under capture broke that."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    groups = (ExpertGroup(0, tuple(range(checkpoint.architecture.num_experts))),)
    asked: list[bool] = []
    with local_experts(checkpoint, groups, torch.float32, torch.device("cpu")) as transport:
        dispatcher = CountingDispatcher(groups, transport)
        with EngineUnderTest(checkpoint, EngineConfig(device="cpu", max_model_len=64), dispatcher) as engine:
            engine._engine.model_runner.graphs = lambda *_: asked.append(dispatcher.counting)  # type: ignore[assignment]
            reads = engine.count_expert_reads(Workload(2, 3, 4))
    assert 2 * checkpoint.architecture.num_layers <= reads <= 4 * checkpoint.architecture.num_layers
    assert asked
    assert not any(asked)


def test_the_peak_of_a_block_is_what_it_held_for_a_while() -> None:
    with resident_memory() as memory:
        held = bytearray(64 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        del held
    assert memory.grown is not None
    assert 60 * 2**20 < memory.grown < 80 * 2**20
    with resident_memory() as memory:
        pass
    assert memory.grown is not None
    assert memory.grown < 2**20  # the one before does not count


@needs_two_cores
def test_shards_have_cores_for_themselves() -> None:
    """Threads that this process has already, and processes of Ray that began before, move to the others."""
    before = os.sched_getaffinity(0)
    cores = Cores.split(1)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    sleep = {"executable": "/bin/sleep", "stdin": subprocess.DEVNULL}
    try:
        with cores.started_for_shards():
            shard = subprocess.Popen(["ray::ExpertShard.answer", "60"], **sleep)
            raylet = subprocess.Popen(["raylet", "60"], **sleep)
        with shard, raylet:
            assert os.sched_getaffinity(shard.pid) == set(cores.of_shards)
            for others in (raylet.pid, 0, thread.native_id):
                assert os.sched_getaffinity(others) == set(cores.of_engine)
            shard.kill()
            raylet.kill()
    finally:
        stop.set()
        for own in psutil.Process().threads():
            os.sched_setaffinity(own.id, before)
    assert set(cores.of_shards) | set(cores.of_engine) == before
    assert not set(cores.of_shards) & set(cores.of_engine)


@pytest.mark.long
@pytest.mark.parametrize("shard_cores", [None, pytest.param(1, marks=needs_two_cores)])
def test_experts_in_processes_of_their_own(shard_cores: int | None) -> None:
    """In a process of its own, as it starts a Ray. The deployments were once looked for where they no longer were."""
    command = [Path(sys.executable).with_name("manta"), "bench", "decode", "--transport", "lane", "--groups", "2"]
    options = "--batch 1 --prompt-tokens 4 --output-tokens 3 --pairs 1 --no-prefill --compare local"
    command += [] if shard_cores is None else ["--shard-cores", str(shard_cores)]
    done = subprocess.run([*command, *options.split()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["shard_cores"] == shard_cores
    assert shard_cores is None or line["threads"] == len(os.sched_getaffinity(0)) - shard_cores
    assert (line["transport"], line["groups"], [row["batch"] for row in line["results"]]) == ("lane", 2, [1])
    beside = line["results"][0]["rivals"][0]
    assert (beside["name"], beside["implementation"], beside["equal_tokens"]) == ("local", "experts in this process", 1)


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
    [
        ("--groups 9", "8 experts"),
        ("--prompt-tokens 40000", "context is 32768"),
        ("--batch 100000 --context 30000", "such sequences would fit"),
        ("--context 64 --prefill 16x64", "either --context or --prefill"),
        ("--prefill 16", "write 16x64"),
        ("--compare local", "give --transport auto"),
        ("--shard-cores 1", "give --transport auto"),
        ("--transport auto --shard-cores 9999", "the engine needs one"),
    ],
)
def test_what_cannot_be_measured_is_said_first(options: str, sentence: str) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code != 0
    assert sentence in str(result.exception)


def test_prompts_that_never_decode_side_by_side_are_an_error_not_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 prompts of 2,048 tokens were: the first had all its tokens before the last was computed. It printed nan."""
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = "--batch 2 --prompt-tokens 1100 --output-tokens 2 --pairs 1 --no-prefill"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split()])
    assert result.exit_code != 0
    assert "nan" not in result.output
    assert "do not decode side by side" in str(result.exception)
    assert "1 would, or with more --output-tokens; with --context 1100" in str(result.exception)


@pytest.mark.parametrize("num_groups", range(1, 17))
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_a_bench_fits_the_cards_that_it_shares(monkeypatch, gpus, num_groups):
    """With seven groups on a card shards took 0.903 of it, and its coordinator waited for a tenth."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = _gpus_per_shard(num_groups)
    if num_groups < gpus:
        assert given is None
    else:
        assert given > 0
        assert given * -(-num_groups // gpus) <= 0.9
