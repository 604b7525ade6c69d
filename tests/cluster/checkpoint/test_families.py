"""What each family's file makes of a config.json, beside transformers' own reading of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.configuration.hyperparameters import architecture_from_config
from cluster.checkpoint.families import FAMILIES
from cluster.checkpoint.json_document import JsonDocument
from cluster.errors import CheckpointError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "max_position_embeddings": 512,
    "intermediate_size": 48,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
QWEN_MOE = EXPERTS | {"moe_intermediate_size": 24}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "olmoe": EXPERTS,
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": QWEN_MOE,
}


def read(model_type: str, **changes: Any) -> Architecture:
    values = SIZES | OWN.get(model_type, {}) | changes
    return architecture_from_config(JsonDocument(Path("config.json"), values | {"model_type": model_type}))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_config_leaves_out_is_transformers_default(model_type: str) -> None:
    ours = read(model_type, tie_word_embeddings=False)
    theirs = AutoConfig.for_model(model_type, **SIZES | OWN.get(model_type, {}))
    window = getattr(theirs, "sliding_window", None) or None
    head_dim = getattr(theirs, "head_dim", None) or 256 // 32
    assert (ours.num_kv_heads, ours.head_dim, ours.rms_norm_eps, ours.rope_theta, ours.sliding_window) == (
        theirs.num_key_value_heads,
        head_dim,
        theirs.rms_norm_eps,
        theirs.rope_parameters["rope_theta"],
        window,
    )
    gate = ours.layers[0].gate
    if hasattr(theirs, "norm_topk_prob"):
        assert gate is not None
        assert gate.renormalised is theirs.norm_topk_prob


@pytest.mark.parametrize(
    ("changes", "experts_in"),
    [
        ({}, [True] * 4),
        ({"mlp_only_layers": [0, 3]}, [False, True, True, False]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
    ],
)
def test_some_layers_of_qwen_are_dense(changes: dict[str, Any], experts_in: list[bool]) -> None:
    architecture = read("qwen3_moe", **changes)
    assert [layer.has_experts for layer in architecture.layers] == experts_in
    assert [layer.dense_size for layer in architecture.layers] == [0 if has else 48 for has in experts_in]
    assert (architecture.intermediate_size, architecture.num_expert_layers) == (24, sum(experts_in))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, which Manta does not support; expected false"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"num_experts": 8}, "num_experts is not known"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "one window in all layers or none"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, "they contradict"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, "they contradict"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types is not 'full_attention' throughout"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"clip_qkv": 8.0}, "clip_qkv is not known"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers holds 4; expected integers from 0 to 3"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most num_experts=8"),
        ("qwen3_moe", {"num_experts": 1025}, "num_experts is 1025; expected an integer from 1 to 1024"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is not known"),
        ("qwen2_moe", {"use_sliding_window": True}, "one window in all or none"),
        ("qwen2_moe", {"attention_bias": True}, "attention_bias is True"),
        ("granitemoe", {"attention_bias": True}, "attention_bias is True"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0; expected a number above 0"),
        ("granitemoe", {"shared_intermediate_size": 8}, "shared_intermediate_size is not known"),
        ("olmoe", {"head_dim": 32}, "head_dim is not hidden_size / num_attention_heads"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv is -1; expected a number above 0"),
    ],
)
def test_what_a_family_has_not_is_refused_by_name(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(model_type, **changes)
    assert message in caught.value.message


def test_a_window_of_all_layers_is_read() -> None:
    said = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert [read(model_type, **said).sliding_window for model_type in ("qwen2", "qwen3", "qwen3_moe")] == [64] * 3
    assert read("qwen3_moe", **said | {"max_window_layers": 4}).sliding_window == 64, "it asks no layer there"
    del said["sliding_window"]
    assert [read(model_type, **said).sliding_window for model_type in ("qwen2", "qwen3", "qwen3_moe")] == [4096] * 3
