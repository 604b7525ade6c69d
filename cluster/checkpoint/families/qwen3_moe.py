"""Qwen3-MoE: Qwen3's attention; Qwen2-MoE's gate and layers, without a shared expert."""

from __future__ import annotations

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families import qwen2, qwen2_moe
from cluster.checkpoint.families.family import Defaults, Family, decoder, experts, window
from cluster.checkpoint.json_document import JsonDocument

DEFAULTS = Defaults(kv_heads=4)


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    layers = qwen2_moe.layers(
        config,
        LayerSpec(gate=qwen2_moe.gate(config), qk_norm="head"),
        lambda size: LayerSpec(dense_size=size, qk_norm="head"),
    )
    return decoder(config, layers, DEFAULTS, experts(config, "moe_intermediate_size"), sliding_window=_window(config))


def _window(config: JsonDocument) -> int | None:
    """Of all layers, whatever max_window_layers says."""
    if not config.boolean("use_sliding_window", default=False):
        return None
    return window(config, qwen2.WINDOW)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, qwen2.KEYS | qwen2_moe.KEYS, qwen2.ONE_VALUE)
