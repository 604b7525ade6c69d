"""Mixtral: Mistral's attention; a softmax gate over experts, whose K weights add up to one and stay in fp32."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, GateSpec, LayerSpec
from cluster.checkpoint.families.family import Defaults, Family, decoder, experts, num_layers, window
from cluster.checkpoint.json_document import JsonDocument, names

LAYER = LayerSpec(gate=GateSpec())
DEFAULTS = Defaults(norm_eps=1e-5, rope_theta=1e6, kv_heads=8)
EXPERT_KEYS = names(
    "num_experts num_experts_per_tok num_local_experts output_router_logits router_aux_loss_coef router_jitter_noise",
    "router_z_loss_coef",
)


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    return decoder(
        config,
        num_layers(config) * [LAYER],
        DEFAULTS,
        experts(config, "intermediate_size"),
        sliding_window=window(config),
    )


FAMILY = Family("mixtral", "MixtralForCausalLM", read, EXPERT_KEYS)
