"""What a family's file says of it, and what all of them read alike. Knows the keys of config.json that all have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.rope import rope_scaling, rope_section

MAX_LAYERS = 1024
MAX_EXPERTS = 1024


@dataclass(frozen=True, slots=True)
class Family:
    """One model type."""

    model_type: str
    causal_lm: str  # its name in `architectures`
    read: Callable[[JsonDocument], Architecture]  # of a config whose keys have been checked; its dtype means nothing
    keys: frozenset[str] = frozenset()  # that its config may have, beside those of every model
    one_value: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # that may have these values only


@dataclass(frozen=True, slots=True)
class Defaults:
    """transformers', where config.json does not say."""

    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    kv_heads: int | None = None  # where it does not even say null; None: as many as query heads
    head_dim: int | None = None  # None: what is left of hidden_size for each head


@dataclass(frozen=True, slots=True)
class Experts:
    """How many there are, for how many a token, and their intermediate size."""

    number: int
    top_k: int
    size: int


def num_layers(config: JsonDocument) -> int:
    """Of the decoder."""
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)


def experts(config: JsonDocument, size_key: str) -> Experts:
    """As every family counts them. Raises CheckpointError where two names of one number disagree."""
    key = experts_key(config)
    read = Experts(
        number=config.integer(key, maximum=MAX_EXPERTS),
        top_k=config.integer("num_experts_per_tok"),
        size=config.integer(size_key),
    )
    if config.has("num_local_experts") and config.integer("num_local_experts") != read.number:
        raise config.error("num_local_experts", f"is not num_experts={read.number}, and means the same")
    return read


def experts_key(config: JsonDocument) -> str:
    """What the number of experts is called there."""
    return "num_experts" if config.has("num_experts") else "num_local_experts"


def decoder(
    config: JsonDocument,
    layers: Sequence[LayerSpec],
    defaults: Defaults,
    experts: Experts | None = None,
    *,
    sliding_window: int | None = None,
) -> Architecture:
    """With the sizes that all families call the same."""
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    if not config.has("head_dim") and defaults.head_dim is None and hidden_size % num_heads:
        raise config.error("hidden_size", f"is {hidden_size}; expected a multiple of num_attention_heads={num_heads}")
    kv_heads = num_heads if "num_key_value_heads" in config.values else defaults.kv_heads or num_heads
    vocab_size = config.integer("vocab_size")
    bos = config.integers("bos_token_id", vocab_size - 1)
    rope = rope_section(config)
    theta_holder = rope if rope.has("rope_theta") else config
    return Architecture(
        layers=tuple(layers),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size") if experts is None else experts.size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=kv_heads),
        head_dim=config.integer("head_dim", default=defaults.head_dim or max(1, hidden_size // num_heads)),
        num_experts=0 if experts is None else experts.number,
        top_k=0 if experts is None else experts.top_k,
        vocab_size=vocab_size,
        rms_norm_eps=config.number("rms_norm_eps", default=defaults.norm_eps, maximum=1.0),
        rope_theta=theta_holder.number("rope_theta", default=defaults.rope_theta, minimum=1.0),
        rope_scaling=rope_scaling(config),
        max_position_embeddings=config.integer("max_position_embeddings"),
        sliding_window=sliding_window,
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.integers("eos_token_id", vocab_size - 1),
        dtype="float32",
    )


def window(config: JsonDocument, default: int | None = None) -> int | None:
    """Of all layers, where it is said so plainly. `default`: where config.json does not even say null."""
    if "sliding_window" not in config.values:
        return default
    return config.integer("sliding_window") if config.has("sliding_window") else None
