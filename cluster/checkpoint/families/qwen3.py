"""Qwen3: Qwen2 without biases; queries and keys are normed, each head for itself."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families import qwen2
from cluster.checkpoint.families.family import Defaults, Family, decoder, num_layers
from cluster.checkpoint.json_document import JsonDocument

DEFAULTS = Defaults(kv_heads=32, head_dim=128)


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layer = LayerSpec(dense_size=config.integer("intermediate_size"), qk_norm="head")
    return decoder(config, num_layers(config) * [layer], DEFAULTS, sliding_window=qwen2.window(config))


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, qwen2.KEYS, qwen2.ONE_VALUE)
