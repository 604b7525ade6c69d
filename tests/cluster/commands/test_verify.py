"""`manta verify`: a model computed by us and by transformers, in this process."""

import json

import pytest

from cluster.commands.verify.command import run
from cluster.errors import CheckpointError
from experts_service.transformers_backend.experts import TransformersExperts
from tests import families
from tests.transformers_families import write_family

TOKENS = 8


@pytest.fixture
def directory(tmp_path):
    write_family(tmp_path, "glm4_moe")
    return str(tmp_path)


def test_a_family_by_transformers_code_is_as_transformers_computes_it(directory, capsys):
    assert run(directory, None, "auto", "float32", TOKENS, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert (said["model_impl"], said["good"], said["dtype"]) == ("transformers", True, "float32")
    assert [one["output_tokens"] - one["other_tokens"] for one in said["prompts"]] == [TOKENS] * 3
    assert max(one["largest_difference"] for one in said["prompts"]) < 1e-4
    assert not any(one["layers"] for one in said["prompts"])


def test_where_they_differ_the_first_layers_are_named(directory, capsys, monkeypatch):
    """Experts of the second layer that has some, which is layer 2, say too much: layer 3 is the first to see it."""
    right = TransformersExperts.__call__

    def wrong(self, layer, rows, counts, answers=None):
        answers = right(self, layer, rows, counts, answers)
        return answers.mul_(3.0) if layer == 1 else answers

    monkeypatch.setattr(TransformersExperts, "__call__", wrong)
    assert not run(directory, None, "auto", "float32", TOKENS, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert not said["good"]
    for prompt in said["prompts"]:
        attention = [one["layer"] for one in prompt["layers"] if one["what"] == "attention"]
        assert attention == [3]
    assert not run(directory, None, "auto", "float32", TOKENS, as_json=False)
    text = capsys.readouterr().out
    assert "layer 3: attention is off by" in text
    assert "not as transformers computes it: report it, with what manta verify --json prints" in text


def test_native_code_is_verified_as_well(capsys):
    assert run("demo", None, "auto", "float32", TOKENS, as_json=False)
    text = capsys.readouterr().out
    assert "code of ours, float32 on cpu" in text
    assert "8 of 8 tokens" in text


def test_what_transformers_cannot_load_is_said(directory, monkeypatch):
    def fails(*_, **__):
        raise ImportError("a package is missing")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(CheckpointError, match=r"transformers cannot load .* to compare with: a package is missing"):
        run(directory, None, "auto", "float32", 1, as_json=True)


def test_a_model_without_a_head_has_nothing_to_compare(tmp_path):
    """transformers made up a head of random numbers, and every token was another one."""
    families.random_model("qwen3", tie_word_embeddings=False).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"was saved without its output head: it makes embeddings"):
        run(str(tmp_path), None, "auto", "float32", 1, as_json=True)
