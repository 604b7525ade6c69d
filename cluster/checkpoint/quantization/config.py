"""Reads `quantization_config` of a config.json. Knows who writes what there; knows no tensor.

What Manta does not read is refused here by its name, with what to do instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint.json_document import JsonDocument, names, shortened
from cluster.checkpoint.quantization.compressed_tensors import Group, matches, read_groups, read_ignored
from cluster.checkpoint.quantization.scheme import Awq, Block, Gptq, Scheme, Values

METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
FP8_BLOCK = (128, 128)  # transformers', where weight_block_size is not even null

_INSTEAD = (
    "take a version of the model in compressed-tensors' layout, FP8, GPTQ or AWQ (gemm), or the original in bf16 and "
    "quantise it by llm-compressor"
)
_REFUSED = {
    "bitsandbytes": "is made for bitsandbytes' CUDA kernels while the model loads",
    "marlin": "is packed in the order of a CUDA kernel's threads, for no other reader",
    "gguf": "is llama.cpp's format",
    "mxfp4": "is a 4-bit float",
    "nvfp4": "is a 4-bit float",
    "modelopt": "is NVIDIA ModelOpt's own layout",
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})  # of a key that is not known: it says nothing
_FP8_KEYS = names(
    "activation_scheme dequantize expert_dtype fmt ignored_layers kv_cache_scheme modules_to_convert",
    "modules_to_not_convert quant_method scale_fmt weight_block_size",
)
_OF_CALIBRATION = names(  # how the numbers were found, or who computes with them, and not what they mean
    "act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent",
    "dataset disable_exllama do_fuse exllama_config failsafe fuse_max_seq_len is_marlin_format lm_head",
    "max_input_length meta method model_file_base_name model_name_or_path model_seqlen",
    "module_name_preceding_first_block modules_in_block_to_quantize modules_to_not_convert mse offload_to_disk",
    "pack_impl pad_token_id quant_method static_groups tokenizer true_sequential use_cuda_fp16 use_exllama",
)
_OF_BOTH = _OF_CALIBRATION | names("bits format group_size pack_dtype sym")
_GPTQ_KEYS = _OF_BOTH | names("checkpoint_format desc_act")
_AWQ_KEYS = _OF_BOTH | names("version zero_point")
_AUTOAWQ_SPELLING = {"w_bit": "bits", "q_group_size": "group_size"}  # of its own quant_config.json


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint says of how its matrices are stored.

    compressed-tensors says of each matrix whether it is quantised. The others' lists only repeat what is stored, and
    each library spells them in a way of its own: there the stored tensors decide.
    """

    method: str
    schemes: tuple[Scheme, ...] = ()  # in which a matrix may be stored; the first that it is stored in
    groups: tuple[Group, ...] = ()  # compressed-tensors
    ignored: tuple[str, ...] = ()  # the same

    def schemes_of(self, modules: Sequence[str], classes: Collection[str]) -> tuple[Scheme, ...]:
        """In which the matrix of a module may be stored that has these names and is of these classes."""
        if not self.groups:
            return self.schemes
        if any(matches(target, modules, classes) for target in self.ignored):
            return ()
        # The library's order: names before expressions before classes.
        for of_kind in (lambda t: t in modules, lambda t: t.startswith("re:"), lambda t: t in classes):
            for group in self.groups:
                if any(of_kind(target) and matches(target, modules, classes) for target in group.targets):
                    return () if group.scheme is None else (group.scheme,)
        return ()

    @property
    def is_told_by_name(self) -> bool:
        """Whether the config, and not what is stored, says which matrices are quantised."""
        return bool(self.groups)


def read_quantization(config: JsonDocument) -> Quantization | None:
    """None: the checkpoint is not quantised. Raises CheckpointError, naming the key, where Manta cannot read it."""
    if not config.has("quantization_config"):
        return None
    section = config.section("quantization_config")
    method = section.values.get("quant_method")
    if method == "compressed-tensors":
        return Quantization(method, groups=read_groups(section), ignored=read_ignored(section))
    if method == "fp8":
        return Quantization(method, _fp8_schemes(section))
    if method == "gptq":
        return Quantization(method, (_gptq_scheme(section),))
    if method == "awq":
        return Quantization(method, (_awq_scheme(section),))
    what = _REFUSED.get(str(method), f"is none that Manta reads: {', '.join(METHODS)}")
    if section.values.get("load_in_4bit") or section.values.get("load_in_8bit"):
        method, what = "bitsandbytes", _REFUSED["bitsandbytes"]
    raise section.error("quant_method", f"is {shortened(method)}, which {what}; {_INSTEAD}")


def _fp8_schemes(section: JsonDocument) -> tuple[Scheme, ...]:
    """transformers' fine-grained FP8 has `weight_scale_inv`; AutoFP8's has one `weight_scale` a matrix."""
    _refuse_unknown(section, _FP8_KEYS)
    _one_of(section, "activation_scheme", ("dynamic", "static"))
    _one_of(section, "fmt", ("e4m3", "float8_e4m3fn"))
    _one_of(section, "scale_fmt", ("float", "ue8m0"))
    _one_of(section, "expert_dtype", ("fp8",))
    block: Block = FP8_BLOCK
    if "weight_block_size" in section.values:
        block = _block(section) if section.has("weight_block_size") else (None, None)
    return (
        Values(8, is_float=True, block=block, scale_suffix="weight_scale_inv"),
        Values(8, is_float=True, block=(None, None)),
    )


def _block(section: JsonDocument) -> Block:
    size = section.values["weight_block_size"]
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise section.error("weight_block_size", f"is {shortened(size)}; expected two positive integers")
    return size[0], size[1]


def _gptq_scheme(section: JsonDocument) -> Gptq:
    layout = section.values.get("checkpoint_format") or section.values.get("format") or "gptq"
    if section.values.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise section.error(
            "checkpoint_format",
            f"is {shortened(layout)}, which {_REFUSED.get(str(layout), 'is none that Manta reads')}; "
            "save it as 'gptq' or 'gptq_v2'",
        )
    _refuse_unknown(section, _GPTQ_KEYS)
    _one_of(section, "pack_dtype", ("int32",))
    return Gptq(
        bits=_bits(section, (4, 8)),
        group_size=_group_size(section),
        act_order=section.boolean("desc_act", default=False),
        symmetric=section.boolean("sym", default=False),
        stored_less_one=layout == "gptq",
    )


def _awq_scheme(section: JsonDocument) -> Awq:
    for theirs, ours in _AUTOAWQ_SPELLING.items():
        if theirs in section.values:
            section.values.setdefault(ours, section.values.pop(theirs))
    layout = section.values.get("version") or section.values.get("format") or "gemm"
    if str(layout).lower() != "gemm":
        raise section.error(
            "version",
            f"is {shortened(layout)}, which is packed in the order of a CUDA kernel's threads; expected 'gemm'",
        )
    _refuse_unknown(section, _AWQ_KEYS)
    _one_of(section, "pack_dtype", ("int32",))
    # Not by `sym`, which GPTQModel has had beside it with a meaning of its own.
    symmetric = not section.boolean("zero_point", default=True)
    return Awq(_group_size(section), _bits(section, (4,)), symmetric)


def _bits(section: JsonDocument, known: tuple[int, ...]) -> int:
    bits = section.integer("bits")
    if bits not in known:
        raise section.error("bits", f"is {bits}; Manta reads {' and '.join(map(str, known))}; {_INSTEAD}")
    return bits


def _group_size(section: JsonDocument) -> int | None:
    size = section.integer("group_size", minimum=-1)
    if size == 0:
        raise section.error("group_size", "is 0; expected -1, which is all inputs, or a positive integer")
    return None if size == -1 else size


def _one_of(section: JsonDocument, key: str, known: tuple[str, ...]) -> None:
    value = section.values.get(key)
    if value is not None and value not in known:
        raise section.error(key, f"is {shortened(value)}; expected {' or '.join(map(repr, known))}")


def _refuse_unknown(section: JsonDocument, known: Collection[str]) -> None:
    for key, value in section.values.items():
        if key not in known and value not in _NOTHING:
            raise section.error(
                key, "is not known to Manta and may change what the numbers mean; where it does not, take it out"
            )
