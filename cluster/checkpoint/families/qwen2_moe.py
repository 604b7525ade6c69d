"""Qwen2-MoE: Qwen2's attention; experts beside a shared expert, which has a gate of its own. Some layers are dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.checkpoint.architecture import Architecture, GateSpec, LayerSpec
from cluster.checkpoint.families import mixtral, qwen2
from cluster.checkpoint.families.family import Defaults, Family, decoder, experts, num_layers
from cluster.checkpoint.json_document import JsonDocument, names

DEFAULTS = Defaults(kv_heads=16)
SHARED_SIZE = 5632  # transformers', where config.json does not say
GATE = GateSpec(renormalised=False, rounded=True)  # Mixtral's, whose weights need not add up to one, and are rounded
KEYS = mixtral.EXPERT_KEYS | names("decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob")


def read(config: JsonDocument) -> Architecture:
    """By its config.json."""
    has_bias = config.boolean("qkv_bias", default=True)
    sparse = LayerSpec(
        gate=gate(config),
        dense_size=config.integer("shared_expert_intermediate_size", default=SHARED_SIZE),
        dense_is_gated=True,
        has_qkv_bias=has_bias,
    )
    of_all = layers(config, sparse, lambda size: LayerSpec(dense_size=size, has_qkv_bias=has_bias))
    if config.boolean("use_sliding_window", default=False):
        raise config.error("use_sliding_window", "is true for every other layer; Manta runs one window in all or none")
    return decoder(config, of_all, DEFAULTS, experts(config, "moe_intermediate_size"))


def gate(config: JsonDocument) -> GateSpec:
    """With norm_topk_prob weights do add up to one."""
    return replace(GATE, renormalised=config.boolean("norm_topk_prob", default=False))


def layers(config: JsonDocument, sparse: LayerSpec, dense: Callable[[int], LayerSpec]) -> list[LayerSpec]:
    """`sparse`, where neither mlp_only_layers nor decoder_sparse_step says that a layer is `dense` of a size."""
    number, step = num_layers(config), config.integer("decoder_sparse_step", default=1)
    only_dense = config.integers("mlp_only_layers", number - 1)
    of_all = [
        dense(config.integer("intermediate_size")) if index in only_dense or (index + 1) % step else sparse
        for index in range(number)
    ]
    if sparse not in of_all:
        raise config.error("decoder_sparse_step", "and mlp_only_layers leave no layer with experts")
    return of_all


FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    read,
    qwen2.KEYS | KEYS | names("qkv_bias shared_expert_intermediate_size"),
    qwen2.ONE_VALUE,
)
