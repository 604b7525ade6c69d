"""Llama: dense, rotary attention over all tokens, no biases. What all other families are a change of."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families.family import Defaults, Family, decoder, num_layers
from cluster.checkpoint.json_document import JsonDocument


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layer = LayerSpec(dense_size=config.integer("intermediate_size"))
    return decoder(config, num_layers(config) * [layer], Defaults())


FAMILY = Family("llama", "LlamaForCausalLM", read)
