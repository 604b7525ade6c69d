"""`manta bench make-model`: what it writes is a checkpoint to us and to transformers, and the same for one seed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MixtralForCausalLM

from cluster.checkpoint.architecture import Architecture, all_tensors
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.commands.bench.make_model import write_model
from cluster.commands.bench.shapes import BENCH, num_parameters
from cluster.errors import SetupError

TINY = replace(
    BENCH,
    layers=BENCH.layers[:2],
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=2304,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_model(TINY, directory, shard_bytes=200_000)
    return directory


def test_shapes_have_the_parameters_that_they_promise() -> None:
    assert num_parameters(BENCH) / 1e9 == pytest.approx(0.79, abs=0.005)
    assert num_parameters(MIXTRAL_8X7B) == 46_702_792_704  # the hub's own


def test_our_checkpoint_reader_finds_it_whole(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    assert checkpoint.architecture == TINY
    assert {name: ref.shape for name, ref in checkpoint.tensors.items()} == all_tensors(TINY)
    assert len({ref.file for ref in checkpoint.tensors.values()}) > 2


def test_transformers_loads_it_and_its_logits_are_sane(directory: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = model(torch.randint(5, 2304, (2, 32))).logits
    assert 0.3 < logits.std() < 3


def test_every_id_decodes_and_text_encodes_as_the_demo_models(directory: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == TINY.vocab_size
    text = "What is the best w7 cheese?"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 2048
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([2303]).startswith(" w")
    assert "[INST]" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_the_seed_decides_every_byte(directory: Path, tmp_path: Path) -> None:
    def fingerprint(seed: int) -> str:
        write_model(TINY, tmp_path / str(seed), seed=seed)
        return open_checkpoint(tmp_path / str(seed)).fingerprint

    assert fingerprint(0) == open_checkpoint(directory).fingerprint
    assert fingerprint(1) != fingerprint(2)


def test_a_full_disk_and_a_full_directory_are_said_before_anything_is_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match="not empty"):
        write_model(TINY, directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(SetupError, match=r"0\.0 GB free"):
        write_model(TINY, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_writing_is_interrupted(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    architecture: Architecture = TINY
    with pytest.raises(KeyboardInterrupt):
        write_model(architecture, tmp_path / "new", on_bytes=interrupt)
    assert list(tmp_path.iterdir()) == []
