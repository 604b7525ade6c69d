"""The shapes that `manta bench make-model` writes, as a hub config. Sizes only; no tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.known_models import MIXTRAL_8X7B

BENCH = replace(
    MIXTRAL_8X7B,
    layers=MIXTRAL_8X7B.layers[:8],
    hidden_size=1024,
    intermediate_size=3584,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
)

SHAPES = {"bench": BENCH, "mixtral-8x7b": MIXTRAL_8X7B}


def num_parameters(architecture: Architecture) -> int:
    """Of the whole model."""
    return sum(map(math.prod, all_tensors(architecture).values()))


def standard_deviation(name: str, shape: Shape) -> float | None:
    """Of a random tensor, so that activations and logits stay near one. None: a norm, all ones."""
    if len(shape) == 1:
        return None
    return 0.02 if "embed_tokens" in name else 1 / math.sqrt(shape[1])


def hub_config(architecture: Architecture) -> dict[str, Any]:
    """The `config.json` of such a model."""
    a = architecture
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": a.dtype,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "num_local_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "vocab_size": a.vocab_size,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},
        "max_position_embeddings": a.max_position_embeddings,
        "sliding_window": a.sliding_window,
        "tie_word_embeddings": a.tie_word_embeddings,
        "bos_token_id": a.bos_token_id,
        "eos_token_id": a.eos_token_ids[0],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "use_cache": True,
    }
