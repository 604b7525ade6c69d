"""The shapes that `manta bench make-model` writes, as a hub config. Sizes only; no tensors."""

from __future__ import annotations

import math
from typing import Any

from cluster.architecture import Architecture, Shape, all_tensors

CONTEXT = 32768  # tokens

BENCH = Architecture(
    num_layers=8,
    hidden_size=1024,
    intermediate_size=3584,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    num_experts=8,
    top_k=2,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=CONTEXT,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
)

MIXTRAL_8X7B = Architecture(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=CONTEXT,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
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
