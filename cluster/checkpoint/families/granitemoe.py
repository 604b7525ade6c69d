"""Granite-MoE: Llama's attention; softmax over the scores of the chosen experts alone; four multipliers."""

from __future__ import annotations

from dataclasses import replace

from cluster.checkpoint.architecture import Architecture, GateSpec, LayerSpec, Multipliers
from cluster.checkpoint.families import mixtral
from cluster.checkpoint.families.family import Defaults, Family, decoder, experts, num_layers
from cluster.checkpoint.json_document import JsonDocument, names

LAYER = LayerSpec(gate=GateSpec(softmax="chosen", rounded=True))
DEFAULTS = Defaults()


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    architecture = decoder(config, num_layers(config) * [LAYER], DEFAULTS, experts(config, "intermediate_size"))
    multipliers = Multipliers(
        embedding=config.number("embedding_multiplier", default=1.0),
        attention=config.number("attention_multiplier", default=1.0),
        residual=config.number("residual_multiplier", default=1.0),
        logits_divisor=config.number("logits_scaling", default=1.0),
    )
    return replace(architecture, multipliers=multipliers)


FAMILY = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    read,
    mixtral.EXPERT_KEYS | names("attention_multiplier embedding_multiplier logits_scaling residual_multiplier"),
)
