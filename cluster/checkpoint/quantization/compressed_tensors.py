"""Reads the groups of a compressed-tensors config: which matrices are stored how. Knows its keys; knows no tensor.

What the library says of activations is not read: Manta multiplies weights with activations as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint.json_document import JsonDocument, names, shortened
from cluster.checkpoint.quantization.scheme import Block, Packed, Scheme, Values

PACKED = "pack-quantized"
UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"  # each group names its own

_KEYS = names(
    "config_groups dequantize format global_compression_ratio ignore kv_cache_scheme quant_method quantization_status",
    "run_compressed use_optimized_inference version",
)
_GROUP_KEYS = names("format input_activations output_activations targets weights")
_WEIGHT_KEYS = names(
    "actorder block_structure dynamic group_size num_bits observer observer_kwargs scale_dtype strategy symmetric type",
    "zp_dtype",
)
_HARMLESS: dict[str, tuple[Any, ...]] = {  # what says that there is none
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
}
_REMEDY = {
    "sparsity_config": "save the model without the sparse compressor",
    "transform_config": "its rotations of activations are not computed here",
    "moe_sparsity_config": "experts that were taken out are not known here",
}


@dataclass(frozen=True, slots=True)
class Group:
    """What of a model is stored alike."""

    targets: tuple[str, ...]  # of modules: a name, `re:` and an expression that its name begins with, or a class
    scheme: Scheme | None  # None: the weights are as they were


def read_groups(section: JsonDocument) -> tuple[Group, ...]:
    """All of a config. Raises CheckpointError, naming the key, where Manta cannot read it."""
    for key, value in section.values.items():
        if key in _HARMLESS and not (value in _HARMLESS[key] or _is_dense(value)):
            raise section.error(key, f"is set, which Manta does not read: {_REMEDY[key]}")
        if key not in _KEYS and key not in _HARMLESS and value is not None:
            raise section.error(key, "is not known to Manta and may change what the numbers mean")
    groups = section.section("config_groups")
    if not groups.values:
        raise section.error("config_groups", "is missing, which says what is quantised")
    return tuple(_group(groups.section(name), section) for name in groups.values)


def read_ignored(section: JsonDocument) -> tuple[str, ...]:
    """What stays as it was, whatever group names it."""
    return _targets(section, "ignore")


def matches(target: str, modules: Sequence[str], classes: Collection[str]) -> bool:
    """Whether a module is meant that has these names and is of these classes."""
    if target.startswith("re:"):
        return any(re.match(target.removeprefix("re:"), module) for module in modules)
    return target in modules or target in classes


def _is_dense(value: Any) -> bool:
    return isinstance(value, dict) and value.get("format") == "dense"


def _group(group: JsonDocument, section: JsonDocument) -> Group:
    _refuse_unknown(group, _GROUP_KEYS)
    targets = _targets(group, "targets")
    if not targets:
        raise group.error("targets", "is missing, which names the modules of the group")
    if not group.has("weights"):
        return Group(targets, None)
    layout = group.values.get("format") or section.values.get("format")
    holder = group if group.has("format") else section
    if layout != PACKED and layout not in UNPACKED:
        raise holder.error("format", f"is {shortened(layout)}, which Manta does not read; {_instead(layout)}")
    return Group(targets, _scheme(group.section("weights"), layout))


def _instead(layout: Any) -> str:
    known = ", ".join((PACKED, *UNPACKED))
    if layout == MIXED:
        return f"there each group names its own format: {known}"
    return f"save the model as one of {known}"


def _scheme(weights: JsonDocument, layout: str) -> Scheme:
    _refuse_unknown(weights, _WEIGHT_KEYS)
    if weights.values.get("dynamic"):
        raise weights.error("dynamic", "is true: weights without scales of their own")
    bits, kind = weights.integer("num_bits"), str(weights.values.get("type", "int")).lower()
    if kind not in ("int", "float"):
        raise weights.error("type", f"is {kind!r}; expected 'int' or 'float'")
    if bits not in ((8,) if kind == "float" else (4, 8)):
        raise weights.error(
            "num_bits",
            f"is {bits} of type {kind!r}; Manta reads int of 4 and 8 bits and float of 8. Take such a version, or the "
            "original in bf16",
        )
    block = _block(weights)
    zero_points = not weights.boolean("symmetric", default=True)
    if layout != PACKED:
        if _act_order(weights):
            raise weights.error("actorder", f"is set, which the format {layout!r} has no place for")
        return Values(bits, kind == "float", block, zero_points)
    if kind == "float":
        raise weights.error("type", f"is 'float', which the format {PACKED!r} has no place for")
    return Packed(bits, block, zero_points, _act_order(weights))


def _block(weights: JsonDocument) -> Block:
    """The outputs and inputs that share a scale, by the library's rules."""
    group_size = weights.integer("group_size", minimum=-1) if weights.has("group_size") else None
    strategy = weights.values.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy == "group":
        if group_size is None or group_size < 1:
            raise weights.error("group_size", f"is {group_size}; expected a positive integer for strategy 'group'")
        return 1, group_size
    if strategy == "block":
        size = weights.values.get("block_structure")
        if isinstance(size, str):  # early spelling: "128x128"
            size = [int(n) if n.isdecimal() else 0 for n in size.split("x")]
        if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
            raise weights.error(
                "block_structure",
                f"is {shortened(weights.values.get('block_structure'))}; expected two positive integers",
            )
        return size[0], size[1]
    raise weights.error("strategy", f"is {shortened(strategy)}; expected 'tensor', 'channel', 'group' or 'block'")


def _act_order(weights: JsonDocument) -> bool:
    """Whether the groups of inputs are written down, as they are not neighbours."""
    order = weights.values.get("actorder")
    if order in (None, False, "weight", "static"):
        return False
    if order in (True, "group", "dynamic"):
        return True
    raise weights.error("actorder", f"is {shortened(order)}; expected 'group' or 'weight'")


def _targets(section: JsonDocument, key: str) -> tuple[str, ...]:
    value = section.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise section.error(key, f"is {shortened(value)}; expected a list of names")
    for target in value:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise section.error(key, f"holds {shortened(target)}, which is no expression: {error}") from error
    return tuple(value)


def _refuse_unknown(section: JsonDocument, known: Collection[str]) -> None:
    for key, value in section.values.items():
        if key not in known and value is not None:
            raise section.error(key, "is not known to Manta and may change what the numbers mean")
