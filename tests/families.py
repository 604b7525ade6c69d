"""Tiny random models of every family that Manta reads, made by transformers, in the layouts that the hub has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.checkpoints import TINY

Layout = Literal["hub", "fused"]  # one tensor a matrix, or as transformers 5 has experts in memory

_DENSE = {key: value for key, value in TINY.items() if key not in ("num_local_experts", "num_experts_per_tok")}
_WHOLE = {key: value for key, value in _DENSE.items() if key != "head_dim"}  # which is hidden size / heads there
_QWEN3_MOE = _DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "llama-3.1": _DENSE | {"rope_parameters": _LLAMA3},
    "qwen2": _WHOLE,
    "qwen3": _DENSE,
    "qwen3-yarn": _DENSE | {"rope_parameters": _YARN},
    "qwen3-linear": _DENSE | {"rope_parameters": _LINEAR},
    "qwen3_moe": _QWEN3_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_moe-128": _QWEN3_MOE
    | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False, "initializer_range": 0.5},
    "olmoe": _WHOLE | {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5, "eos_token_id": 2},
    "qwen2_moe": _WHOLE
    | {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "granitemoe": _WHOLE
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
}
MODEL_TYPES = {  # of what is not called so
    "llama-3.1": "llama",
    "qwen3-yarn": "qwen3",
    "qwen3-linear": "qwen3",
    "qwen3_moe-128": "qwen3_moe",
}


def random_model(name: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """In fp32, eval mode. No norm is all ones and no bias all zeros, so that a forgotten one shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(MODEL_TYPES.get(name, name), **CONFIGS[name] | config_overrides)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for of, parameter in model.named_parameters():
            if "norm" in of:
                parameter.uniform_(0.5, 1.5)
            elif of.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def write_model(directory: Path, model: PreTrainedModel, layout: Layout = "hub") -> None:
    """As checkpoints of the hub are written, or as transformers 5 has the model in memory."""
    model.save_pretrained(directory, save_original_format=layout == "hub")
