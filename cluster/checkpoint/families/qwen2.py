"""Qwen2: Llama with biases of queries, keys and values, and a sliding window that no released model uses."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families import family
from cluster.checkpoint.families.family import Defaults, Family, decoder, num_layers
from cluster.checkpoint.json_document import JsonDocument, names

DEFAULTS = Defaults(kv_heads=32)
WINDOW = 4096  # transformers', where config.json does not even say null
FIRST_WITH_WINDOW = 28  # the same, of max_window_layers
KEYS = names("max_window_layers")
ONE_VALUE = {"use_mrope": (False,)}


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layer = LayerSpec(dense_size=config.integer("intermediate_size"), has_qkv_bias=True)
    return decoder(config, num_layers(config) * [layer], DEFAULTS, sliding_window=window(config))


def window(config: JsonDocument) -> int | None:
    """Of all layers. Raises CheckpointError where some have it and some have not."""
    if not config.boolean("use_sliding_window", default=False):
        return None
    if config.integer("max_window_layers", default=FIRST_WITH_WINDOW, minimum=0):
        raise config.error(
            "use_sliding_window", "is true from layer max_window_layers on; Manta runs one window in all layers or none"
        )
    return family.window(config, WINDOW)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, KEYS, ONE_VALUE)
