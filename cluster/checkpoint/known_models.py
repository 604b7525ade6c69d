"""Sizes of models that are served from the hub, for plans made where their weights are not. Reads nothing.

From each model's config.json. What is served is always read from the checkpoint itself.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.checkpoint.architecture import Architecture

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
    max_position_embeddings=32768,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
)
MIXTRAL_8X22B = replace(
    MIXTRAL_8X7B,
    num_layers=56,
    hidden_size=6144,
    intermediate_size=16384,
    num_heads=48,
    max_position_embeddings=65536,
)

KNOWN_MODELS: dict[str, Architecture] = {
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL_8X7B,
    "mistralai/Mixtral-8x22B-v0.1": MIXTRAL_8X22B,
}
