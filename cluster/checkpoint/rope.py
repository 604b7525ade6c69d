"""How rotary position embedding is stretched to longer contexts: `rope_parameters` of config.json, once `rope_scaling`.

Knows numbers; the angles are computed in `router_service.model.rotary`. A kind that is not here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint.json_document import JsonDocument, names


@dataclass(frozen=True, slots=True)
class LinearRope:
    """All frequencies divided by one number."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones as they are, those between interpolated: Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN, arXiv 2309.00071."""

    factor: float
    original_max_position_embeddings: int  # tokens
    attention_factor: float  # of cosines and sines
    beta_fast: float
    beta_slow: float
    truncate: bool


RopeScaling = LinearRope | Llama3Rope | YarnRope

_ANY = names("original_max_position_embeddings rope_theta rope_type type")
_KEYS: Mapping[str, frozenset[str]] = {
    "default": _ANY,
    "linear": _ANY | {"factor"},
    "llama3": _ANY | names("factor high_freq_factor low_freq_factor"),
    "yarn": _ANY | names("attention_factor beta_fast beta_slow factor mscale mscale_all_dim truncate"),
}
_ONE_VALUE: Mapping[str, tuple[Any, ...]] = {
    "attention_factor": (1,),
    "factor": (1,),
    "partial_rotary_factor": (1,),
}


def rope_section(config: JsonDocument) -> JsonDocument:
    """What counts, where both are there."""
    return config.section("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")


def rope_scaling(config: JsonDocument) -> RopeScaling | None:
    """None: as it was first described. Raises CheckpointError for other kinds, and other keys, by name."""
    for key in ("rope_parameters", "rope_scaling"):
        section = config.section(key)
        kind = _kind(section)
        if not isinstance(kind, str) or kind not in _KEYS:
            raise config.error(key, f"asks for rotary scaling of type {kind!r}; expected one of {', '.join(_KEYS)}")
        section.check_keys(_KEYS[kind], {key: of for key, of in _ONE_VALUE.items() if key not in _KEYS[kind]})
    rope = rope_section(config)
    original_length = (config if config.has("original_max_position_embeddings") else rope).integer(
        "original_max_position_embeddings", default=config.integer("max_position_embeddings")
    )
    match _kind(rope):
        case "linear":
            factor = rope.number("factor")
            return None if factor == 1 else LinearRope(factor)
        case "llama3":
            read = Llama3Rope(
                rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor"), original_length
            )
            if read.high_freq_factor <= read.low_freq_factor:
                raise rope.error(
                    "high_freq_factor",
                    f"is {read.high_freq_factor:g}; expected more than low_freq_factor={read.low_freq_factor:g}",
                )
            return read
        case "yarn":
            return _yarn(rope, original_length)
    return None


def _kind(section: JsonDocument) -> Any:
    return section.values.get("rope_type", section.values.get("type", "default"))


def _yarn(rope: JsonDocument, original_length: int) -> YarnRope:
    """`attention_factor` is worked out where it is not there, as in section 3.4 of the paper."""
    factor = rope.number("factor")
    attention_factor = 1.0
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif factor > 1:
        both = bool(rope.values.get("mscale") and rope.values.get("mscale_all_dim"))
        scale, of_all = (rope.number(key) if both else 1.0 for key in ("mscale", "mscale_all_dim"))
        attention_factor = 0.1 * scale * math.log(factor) + 1.0
        if both:
            attention_factor /= 0.1 * of_all * math.log(factor) + 1.0
    return YarnRope(
        factor,
        original_length,
        attention_factor,
        rope.number("beta_fast", default=32.0),
        rope.number("beta_slow", default=1.0),
        rope.boolean("truncate", default=True),
    )
