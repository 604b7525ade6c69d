"""OLMoE: Llama's attention, queries and keys normed over all heads and then clipped; Qwen2-MoE's gate."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families import mixtral, qwen2_moe
from cluster.checkpoint.families.family import Defaults, Family, decoder, experts, num_layers
from cluster.checkpoint.json_document import JsonDocument, names

DEFAULTS = Defaults(norm_eps=1e-5)


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layer = LayerSpec(
        gate=qwen2_moe.gate(config),
        qk_norm="whole",
        clip_qkv=config.number("clip_qkv") if config.has("clip_qkv") else None,
    )
    architecture = decoder(config, num_layers(config) * [layer], DEFAULTS, experts(config, "intermediate_size"))
    if architecture.head_dim * architecture.num_heads != architecture.hidden_size:
        raise config.error("head_dim", "is not hidden_size / num_attention_heads, and there is no other in this family")
    return architecture


FAMILY = Family("olmoe", "OlmoeForCausalLM", read, mixtral.EXPERT_KEYS | names("clip_qkv norm_topk_prob"))
