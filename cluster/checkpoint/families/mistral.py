"""Mistral: Llama with a sliding window, which all layers have or none."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families.family import Defaults, Family, decoder, num_layers, window
from cluster.checkpoint.json_document import JsonDocument

DEFAULTS = Defaults(kv_heads=8)
WINDOW = 4096  # transformers', where config.json does not even say null


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layer = LayerSpec(dense_size=config.integer("intermediate_size"))
    return decoder(config, num_layers(config) * [layer], DEFAULTS, sliding_window=_window(config))


def _window(config: JsonDocument) -> int | None:
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list) and kinds and all(kind == "full_attention" for kind in kinds):
        return None  # such a Mistral is a Ministral to transformers
    return window(config, WINDOW)


FAMILY = Family("mistral", "MistralForCausalLM", read)
