"""What is planned of a model that transformers' code computes, and what is said not to be known."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.cli import app
from cluster.errors import ConfigError
from cluster.planning.weights import held_weights
from experts_service.transformers_backend.loading import load_experts, load_own
from experts_service.transformers_backend.meta_model import build
from tests.transformers_families import write_family
from tests.widened_checkpoints import write_mxfp4


@pytest.fixture
def directory(tmp_path):
    write_family(tmp_path, "glm4_moe")
    return tmp_path


def test_bytes_are_counted_and_the_rest_is_said_not_to_be_known(directory):
    done = CliRunner().invoke(app, ["plan", str(directory), "--json", "--context", "128"])
    assert done.exit_code == 0, done.output
    [plan] = json.loads(done.stdout)
    checkpoint = open_checkpoint(directory)
    weights = held_weights(checkpoint, "float32", "cuda")
    assert plan["weight_bytes"] == weights.coordinator + 8 * weights.expert
    assert plan["weight_bytes"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert any("operations are those of a plain decoder" in one for one in plan["not_known"])
    text = CliRunner().invoke(app, ["plan", str(directory), "--context", "128"]).stdout
    assert "Not known: operations are those of a plain decoder" in text.replace("\n", " ")
    assert "Bytes are those in memory" not in text


def test_bytes_of_what_is_widened_are_those_in_memory(tmp_path):
    """gpt-oss in MXFP4 takes four times what its files do."""
    write_mxfp4(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    [plan] = json.loads(CliRunner().invoke(app, ["plan", str(tmp_path), "--json", "--context", "128"]).stdout)
    numbers = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert plan["weight_bytes"] == 2 * numbers > 1.5 * sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert plan["widened"] == ["MXFP4"]
    text = CliRunner().invoke(app, ["plan", str(tmp_path), "--context", "128"]).stdout.replace("\n", " ")
    assert "Bytes are those in memory: weights in MXFP4 are widened to bfloat16 while they  are read." in text


@pytest.mark.parametrize("family", ["muse_spark", "laguna", "step3p7", "ernie4_5_vl_moe", "deepseek_ocr2"])
def test_bytes_that_are_counted_are_those_that_are_read(tmp_path, family):
    """A shard was told to have a part of a norm that it reads whole (Muse Spark), and biases of the gate (Laguna); the
    coordinator had what sees pictures, which it does not read.
    """
    write_family(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path, "transformers")
    architecture, cpu = checkpoint.architecture, torch.device("cpu")
    held = held_weights(checkpoint, "float32", "cpu")
    for count in (1, 4):
        read: list[int] = []
        load_experts(
            build(tmp_path, architecture, torch.float32), checkpoint, list(range(count)), cpu, on_bytes=read.append
        )
        assert sum(read) == checkpoint.expert_bytes(range(count)) <= count * held.expert
    read = []
    meta = build(tmp_path, architecture, torch.float32)
    for name, _ in meta.experts:
        block, _, attribute = name.rpartition(".")
        setattr(meta.model.get_submodule(block), attribute, torch.nn.Identity())
    load_own(meta, checkpoint, cpu, on_bytes=read.append)()
    assert sum(read) == checkpoint.coordinator_bytes() == held.coordinator


def test_tiers_are_not_planned(directory):
    question = CliRunner().invoke(app, ["plan", str(directory), "--ram", "64GB"])
    assert isinstance(question.exception, ConfigError)
    assert "is for transformers' code, whose weights are not rounded for tiers" in str(question.exception)
