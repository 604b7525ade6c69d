"""What the files of a rounded checkpoint hold, in compressed-tensors' layout: its config, and its tensors by name.

Names are the hub's, of experts too, whatever the plain checkpoint calls them: vLLM and transformers know those. Knows
names, dtypes and shapes; rounds nothing and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.quantization.rounding import RoundedRef, Rounding
from cluster.checkpoint.quantization.scheme import Role, Values
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.checkpoint.writing.new_model import NewTensor
from cluster.errors import CheckpointError, ConfigError

_IGNORED = {"attention": "re:.*\\.self_attn\\..*", "experts": "re:.*\\.(block_sparse_moe|mlp)\\..*"}
_GATES = "re:.*\\.gate$"
_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def quantization_config(architecture: Architecture, rounding: Rounding) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Of FP8 it asks for activations that are quantised row by row, as llm-compressor's FP8_DYNAMIC does: GPUs multiply
    nothing else.
    """
    scheme = rounding.scheme
    is_float = isinstance(scheme, Values)
    layout = "float-quantized" if is_float else "pack-quantized"
    weights = {
        "num_bits": scheme.bits,
        "type": "float" if is_float else "int",
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "symmetric": True,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": _TOKENS if is_float else None,
        "output_activations": None,
        "format": layout,
    }
    ignored = [pattern for part, pattern in _IGNORED.items() if not rounding.has(part)]
    if not architecture.is_dense and rounding.has("experts"):
        ignored.append(_GATES)
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def stored_units(checkpoint: Checkpoint) -> dict[str, dict[str, NewTensor]]:
    """For each tensor of a rounded checkpoint what is stored of it. Raises ConfigError, CheckpointError: cannot be."""
    if not (checkpoint.architecture.is_plain or checkpoint.architecture.is_dense):
        raise ConfigError(
            f"{checkpoint.directory}: what is written has Mixtral's names of experts, which this family has not; "
            "engine.quantization rounds them while they are loaded"
        )
    units: dict[str, dict[str, NewTensor]] = {}
    for name, ref in checkpoint.tensors.items():
        if isinstance(ref, RoundedRef):
            units[name] = {part_name: tensor for _, part_name, tensor in _parts(ref)}
        elif isinstance(ref, TensorRef) and not ref.transposed and ref.interleaved_heads is None:
            units[name] = {name: NewTensor(ref.dtype, ref.shape)}
        else:
            raise CheckpointError(f"{ref.stored[0].file}: tensor {ref.name!r} is not stored as the hub stores it.")
    return units


def part_names(ref: RoundedRef) -> Mapping[Role, str]:
    """What the parts of a matrix are called."""
    return {role: name for role, name, _ in _parts(ref)}


def scale_dtype(ref: RoundedRef) -> str:
    """As the others write them, that of the weights; float16 does not hold the scales of small weights."""
    return "F32" if isinstance(ref.rounding.scheme, Values) or ref.plain.dtype == "F32" else "BF16"


def _parts(ref: RoundedRef) -> Iterator[tuple[Role, str, NewTensor]]:
    scheme = ref.rounding.scheme
    inputs = ref.shape[1]
    if scheme.group_size is not None and inputs % scheme.group_size:
        raise ConfigError(
            f"--group-size: {scheme.group_size} does not divide the {inputs} inputs of {ref.name}; compressed-tensors "
            "knows whole groups only"
        )
    for part in scheme.parts(*ref.shape):
        if part.needed:
            dtype = scale_dtype(ref) if part.role == "scales" else part.dtypes[0]
            name = ref.name.removesuffix("weight") + part.suffix
            yield part.role, name, NewTensor(dtype, part.shapes[0])
