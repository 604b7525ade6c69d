"""The shapes that `manta bench make-model` writes, as a hub config. Sizes only; no tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.known_models import MIXTRAL_8X7B, QWEN3_30B_A3B

BENCH = replace(
    MIXTRAL_8X7B,
    layers=MIXTRAL_8X7B.layers[:8],
    hidden_size=1024,
    intermediate_size=3584,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
)

BENCH_QWEN3_MOE = replace(
    QWEN3_30B_A3B,
    layers=QWEN3_30B_A3B.layers[:8],
    hidden_size=1024,
    intermediate_size=224,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=32000,
    bos_token_id=1,
    eos_token_ids=(2,),
)

SHAPES = {"bench": BENCH, "bench-qwen3-moe": BENCH_QWEN3_MOE, "mixtral-8x7b": MIXTRAL_8X7B}

_QWEN3_NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def num_parameters(architecture: Architecture) -> int:
    """Of the whole model."""
    return sum(map(math.prod, all_tensors(architecture).values()))


def standard_deviation(name: str, shape: Shape) -> float | None:
    """Of a random tensor, so that activations and logits stay near one. None: a norm, all ones."""
    if len(shape) == 1:
        return None
    return 0.02 if "embed_tokens" in name else 1 / math.sqrt(shape[1])


def hub_name(architecture: Architecture, name: str) -> str:
    """What the hub calls a tensor of such a model."""
    if not _is_qwen3(architecture):
        return name
    for ours, theirs in _QWEN3_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def hub_config(architecture: Architecture) -> dict[str, Any]:
    """The `config.json` of such a model."""
    a = architecture
    of_family: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": a.intermediate_size,
        "num_local_experts": a.num_experts,
        "router_jitter_noise": 0.0,
    }
    if _is_qwen3(a):
        of_family = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": a.num_experts * a.intermediate_size,  # of a dense layer, and there is none
            "moe_intermediate_size": a.intermediate_size,
            "num_experts": a.num_experts,
            "norm_topk_prob": True,
        }
    return of_family | {
        "dtype": a.dtype,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
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
        "output_router_logits": False,
        "use_cache": True,
    }


def _is_qwen3(architecture: Architecture) -> bool:
    """Else it is a Mixtral."""
    return architecture.layers[0].qk_norm == "head"
