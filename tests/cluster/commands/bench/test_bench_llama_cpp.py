"""llama.cpp beside the engine: its file has the same weights, so that it computes the same logits.

Skipped where `gguf` and `llama-cpp-python` of the `bench` extra are not installed; they compile.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.cli import app
from cluster.commands.bench import machine
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.gguf_file import GgufType, pair_neighbours, write_gguf
from cluster.commands.bench.decode.llama_cpp import LlamaModel, Way, llama_cpp
from tests.checkpoints import interleave_rows, write_checkpoint

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
needs_llama_cpp = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("gguf", "llama_cpp")), reason="llama-cpp-python is not installed"
)
# llama.cpp's blocks of eight bits are 32 numbers long.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def test_rows_of_query_and_key_heads_change_places_as_in_mistrals_own_layout() -> None:
    weight = torch.randn(24, 7)
    assert torch.equal(pair_neighbours(weight, 12), interleave_rows(weight, 12))


@needs_gguf
@pytest.mark.parametrize("kind", list(GgufType))
def test_a_file_has_every_tensor_in_its_type(tmp_path: Path, kind: GgufType) -> None:
    import gguf

    write_checkpoint(tmp_path / "model", **SIZES)
    write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 3 + 2 * (4 + 2 + 1 + 3)
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [96, 64, 4]  # in, out, experts
    for name, tensor in tensors.items():
        kept = "norm" in name or "ffn_gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if kept else kind.name)


@needs_llama_cpp
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("flash_attention", [False, True])
def test_its_logits_are_those_of_the_same_weights(tmp_path: Path, dense: bool, flash_attention: bool) -> None:
    """As far as fp32 with keys and values in fp16 can have them; a matrix in the wrong place changes them by ones."""
    reference = write_checkpoint(tmp_path / "model", dense=dense, **SIZES)
    write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", GgufType.F32)
    model = LlamaModel(str(tmp_path / "model.gguf"), 96, num_threads=1)
    model.open(Way(flash_attention), num_sequences=2, num_tokens=40)
    prompts = torch.randint(5, 96, (2, 30))
    logits = model.compute([(int(prompts[n, i]), i, n, i == 29) for n in range(2) for i in range(30)])
    with torch.no_grad():
        expected = reference(prompts).logits[:, -1]
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0.02, atol=0.02)
    model.close()


@needs_llama_cpp
@pytest.mark.long
def test_a_context_is_computed_once_and_held(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SIZES)
    with llama_cpp(open_checkpoint(tmp_path), GgufType.BF16) as rival:
        workload = Workload.after_context(3, 40, 5)
        first, second = rival.run(workload, Way(True)), rival.run(workload, Way(True))
    assert first.token_ids == second.token_ids
    assert [len(ids) for ids in first.token_ids] == [5, 5, 5]
    assert first.decode_steps == 4


@needs_llama_cpp
@pytest.mark.long
def test_types_are_told_apart_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    options = "--batch 2 --prompt-tokens 8 --output-tokens 3 --pairs 2 --no-prefill"
    compare = "--compare llama.cpp --gguf-type bf16 --gguf-type q8_0 --gguf-type q4_0"
    result = CliRunner().invoke(app, ["bench", "decode", *options.split(), *compare.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout.splitlines()[-1])["results"]
    assert [rival["name"] for rival in row["rivals"]] == ["llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0"]
    assert all(rival["ms_per_step"] > 0 for rival in row["rivals"])


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="gguf is installed")
def test_without_its_packages_it_is_said_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 64 * 2**20)
    result = CliRunner().invoke(app, ["bench", "decode", "--no-prefill", "--compare", "llama.cpp"])
    assert result.exit_code != 0
    assert "manta-serve[bench]" in str(result.exception)
