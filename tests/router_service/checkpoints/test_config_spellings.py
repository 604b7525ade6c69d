"""However a config.json spells a model, its numbers are transformers', or the key that stands in the way is named.

`rope_theta` inside `rope_scaling` was not seen, `layer_types` were ignored, and an `lm_head` beside
`tie_word_embeddings: true` was dropped: log-probabilities were off by 6, and nothing said so.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.errors import CheckpointError
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

IDS = random.Random(0).choices(range(3, 90), k=40)
ABSENT: Any = "absent"  # the key is taken out of the file
ALIKE = {"full": ["full_attention"] * 2, "sliding": ["sliding_attention"] * 2}
Changes = dict[str, Any]

# (dense, changes): all of these run.
READ: list[tuple[bool, Changes]] = [
    *((dense, {"rope_parameters": ABSENT, **changes}) for dense in (False, True) for changes in (
        {},
        {"rope_theta": 777.0},
        {"rope_theta": 777},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_scaling": {"type": "default", "rope_theta": 777.0}, "rope_theta": 5.0},
        {"rope_scaling": {"rope_theta": 777.0}, "rope_theta": 5.0},
        {"rope_scaling": {"type": "default"}, "rope_theta": 777.0},
        {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": 777.0},
        {"rope_scaling": {"type": "linear", "factor": 1.0, "rope_theta": 777.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 777.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 777.0},
        {"rope_scaling": None, "rope_theta": 777.0},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 777.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 777.0},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"rope_scaling": {"rope_theta": 777.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"rope_theta": 777.0, "original_max_position_embeddings": 64},
    )),
    *((dense, changes) for dense in (False, True) for changes in (
        {"sliding_window": ABSENT},
        {"sliding_window": 8},
        {"sliding_window": 8, "layer_types": ALIKE["sliding"], "use_sliding_window": True},
        {"rms_norm_eps": 0.1},
        {"rms_norm_eps": ABSENT},
        {"hidden_act": "swish"},
        {"hidden_act": ABSENT},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": ABSENT},
        {"attention_dropout": 0.5, "initializer_range": 3.0, "use_cache": False, "pad_token_id": 95, "num_labels": 7},
        {"temperature": 0.1, "top_k": 3, "do_sample": True, "max_length": 5, "repetition_penalty": 9.0},
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 4, "unsloth_version": "2025.1"},
    )),
    (False, {"num_local_experts": ABSENT, "num_experts": 4}),
    (False, {"num_experts_per_tok": 1}),
    (True, {"sliding_window": 8, "layer_types": ALIKE["full"], "use_sliding_window": False}),
    (True, {"sliding_window": 8, "layer_types": None}),
    (True, {"sliding_window": ABSENT, "layer_types": ALIKE["sliding"]}),
    (False, {"sliding_window": None, "layer_types": ALIKE["full"], "use_sliding_window": False}),
    (False, {"router_jitter_noise": 0.9, "router_aux_loss_coef": 5.0, "output_router_logits": True}),
]  # fmt: skip

# (dense, changes, key): transformers computes something else with it, or with any of its kind, so it is refused.
REFUSED: list[tuple[bool, Changes, str]] = [
    *((dense, changes, key) for dense in (False, True) for changes, key in (
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ({"rope_scaling": {"rope_theta": 777.0, "mrope_section": [1, 2, 3]}}, "rope_scaling.mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 777.0}}}, "rope_parameters.full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": None, "layer_types": ALIKE["sliding"]}, "layer_types"),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.1}, "logit_scale"),
        ({"num_key_value_heads": ABSENT}, "num_key_value_heads=8"),  # transformers' default; there are 2
    )),
    (False, {"sliding_window": 8, "layer_types": ALIKE["full"]}, "layer_types"),
    (False, {"num_experts_per_tok": ABSENT}, "num_experts_per_tok"),
    (True, {"num_local_experts": 4}, "num_local_experts"),
    (False, {"num_experts": 8}, "num_experts"),
    (False, {"norm_topk_prob": False}, "norm_topk_prob"),
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A Mixtral and a Mistral; `num_experts_per_tok` and the rest are told in their files."""
    root = tmp_path_factory.mktemp("originals")
    for dense in (False, True):
        write_checkpoint(root / str(dense), dense=dense, rms_norm_eps=1e-3)
    return {dense: root / str(dense) for dense in (False, True)}


@pytest.fixture
def spelled(originals: dict[bool, Path], tmp_path: Path) -> Any:
    def spell(dense: bool, changes: Changes) -> Path:
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(originals[dense], directory)
        file = directory / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ABSENT}))
        return directory

    return spell


def reference(directory: Path) -> torch.Tensor:
    """Log-probabilities [T - 1] of IDS but for the first."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def served(directory: Path) -> torch.Tensor:
    bench = Bench(directory)
    request = make_request(IDS, max_tokens=1, prompt_logprobs=0)
    bench.run(request)
    assert request.key not in bench.errors
    [scores] = [chunk.prompt_logprobs for chunk in bench.chunks[request.key] if chunk.prompt_logprobs]
    return torch.tensor([score.token_logprob for score in scores[1:] if score is not None])


@pytest.mark.parametrize(("dense", "changes"), READ, ids=str)
def test_a_spelling_that_runs_has_the_numbers_of_transformers(spelled: Any, dense: bool, changes: Changes) -> None:
    directory = spelled(dense, changes)
    torch.testing.assert_close(served(directory), reference(directory), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dense", "changes", "key"), REFUSED, ids=str)
def test_what_is_not_understood_is_refused_by_its_name(spelled: Any, dense: bool, changes: Changes, key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(spelled(dense, changes))
    assert key in caught.value.message


def test_the_spellings_would_show(spelled: Any) -> None:
    """Another theta, window or epsilon than the file's own is another model by far more than the tolerance."""
    for dense in (False, True):
        own = reference(spelled(dense, {}))
        for changes in ({"rope_parameters": {"rope_theta": 777.0}}, {"sliding_window": 8}, {"rms_norm_eps": 0.1}):
            assert (reference(spelled(dense, changes)) - own).abs().max() > 0.05


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("stored", ["different", "the same", "none"])
def test_a_head_beside_tied_embeddings(spelled: Any, dense: bool, stored: str) -> None:
    """It is used where it is there: transformers ties only what is equal."""
    directory = spelled(dense, {"tie_word_embeddings": True})
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if stored == "the same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif stored == "none":
        del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    torch.testing.assert_close(served(directory), reference(directory), atol=1e-4, rtol=0)


_THETAS = st.sampled_from([ABSENT, 50.0, 777.0, 1e6])
_ROPES = st.sampled_from([ABSENT, None, {}]) | st.fixed_dictionaries(
    {},
    optional={
        "rope_theta": st.sampled_from([50.0, 777.0]),
        "rope_type": st.sampled_from(["default", "linear", "dynamic"]),
        "type": st.sampled_from(["default", "linear"]),
        "factor": st.sampled_from([1.0, 2.0]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
        "original_max_position_embeddings": st.just(64),
    },
)
_CHANGES = st.fixed_dictionaries(
    {
        "rope_theta": _THETAS,
        "rope_scaling": _ROPES,
        "rope_parameters": _ROPES,
        "sliding_window": st.sampled_from([ABSENT, None, 8]),
        "layer_types": st.sampled_from([ABSENT, ABSENT, None, *ALIKE.values()]),
        "tie_word_embeddings": st.sampled_from([ABSENT, False, True]),
        "rms_norm_eps": st.sampled_from([ABSENT, 1e-3, 0.1]),
    }
)


def agree(spelled: Any, dense: bool, changes: Changes) -> None:
    if changes["sliding_window"] is None and dense:  # transformers' Ministral cannot run so
        changes = changes | {"layer_types": ABSENT}
    directory = spelled(dense, changes)
    try:
        ours = served(directory)
    except CheckpointError:
        return
    torch.testing.assert_close(ours, reference(directory), atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dense=st.booleans(), changes=_CHANGES)
def test_spellings_drawn_at_random_are_read_as_transformers_does_or_refused(
    spelled: Any, dense: bool, changes: Changes
) -> None:
    agree(spelled, dense, changes)


@pytest.mark.long
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dense=st.booleans(), changes=_CHANGES)
def test_hundreds_of_spellings_drawn_at_random(spelled: Any, dense: bool, changes: Changes) -> None:
    agree(spelled, dense, changes)
