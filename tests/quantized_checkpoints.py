"""Writes random tiny models in every quantised format that Manta reads, beside the transformers model to compare with.

Each packing is written down here from the format's own definition, one number after the other, and shares nothing with
the code that reads it.

    O outputs, I inputs of a matrix; codes are integers from 0 up where a format packs them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.demo_model import DIRECTORY
from tests.checkpoints import CausalLM, hub_state_dict, random_mistral, random_mixtral

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = dict[str, Tensor]  # by what takes the place of "weight"
Pack = Callable[[Tensor, torch.Generator], tuple[Parts, Tensor]]  # → what is stored, and what it stands for


@dataclass(frozen=True)
class Format:
    """How a whole checkpoint is quantised."""

    config: dict[str, Any]  # quantization_config
    pack: Pack
    also: dict[str, Tensor] = field(default_factory=dict)  # beside each module, by suffix
    packs: Callable[[str], bool] = lambda module: not module.endswith((".gate", "_gate", "lm_head"))
    others: dict[str, Pack] = field(default_factory=dict)  # of modules whose name has such a part

    def pack_of(self, module: str) -> Pack:
        """How one module is packed."""
        return next((pack for part, pack in self.others.items() if part in module), self.pack)


# Compressed-tensors, and fp8


def compressed_tensors(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Format:
    """All Linears of one group; the gates and the head stay as they are."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*\\.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }
    block = {
        None: (None, None),
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or ()),
    }[weights.get("strategy")]
    static = {"input_scale": torch.tensor([0.5])} if activations and not activations.get("dynamic") else {}
    if weights["type"] == "float":
        return Format(config, fp8(block), static)
    pack = pack_quantized if layout == "pack-quantized" else int_quantized
    return Format(
        config,
        pack(
            weights["num_bits"],
            block,
            symmetric=weights.get("symmetric", True),
            act_order=weights.get("actorder") == "group",
        ),
        static,
    )


def fp8(block: tuple[Any, Any], scale_name: str = "weight_scale", scale_dtype: torch.dtype = torch.float32) -> Pack:
    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        scales = of_blocks(weight, block, lambda part: part.abs().max() / 448).to(scale_dtype)
        wide = spread(scales.float(), block, weight.shape)
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, scale_name: stored_scales(scales, block)}, codes.float() * wide

    return pack


def int_quantized(bits: int, block: tuple[Any, Any], *, symmetric: bool, act_order: bool = False) -> Pack:
    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        codes, scales, zeros, _ = quantize(weight, bits, block, symmetric=symmetric)
        middle = 2 ** (bits - 1)
        parts = {"weight": (codes - middle).to(torch.int8), "weight_scale": stored_scales(scales, block)}
        if not symmetric:
            parts["weight_zero_point"] = stored_scales((zeros - middle).to(torch.int8), block)
        return parts, widened(codes, scales, zeros, block)

    return pack


def pack_quantized(bits: int, block: tuple[Any, Any], *, symmetric: bool, act_order: bool) -> Pack:
    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        codes, scales, zeros, groups = quantize(
            weight, bits, block, symmetric=symmetric, act_order=act_order, draw=draw
        )
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": stored_scales(scales, block),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric and block[0] == 1:
            parts["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
        elif not symmetric:
            parts["weight_zero_point"] = stored_scales((zeros - 2 ** (bits - 1)).to(torch.int8), block)
        if act_order:
            parts["weight_g_idx"] = groups
        return parts, widened(codes, scales, zeros, block, groups)

    return pack


def mixed(experts: dict[str, Any], attention: dict[str, Any]) -> Format:
    """Experts of one format, attention of another."""
    packed = compressed_tensors("pack-quantized", experts)
    groups = {
        "experts": {"targets": ["re:.*experts.*", "re:.*mlp.*"], "weights": experts, "format": "pack-quantized"},
        "attention": {"targets": ["Linear"], "weights": attention, "format": "float-quantized"},
    }
    config = packed.config | {"format": "mixed-precision", "config_groups": groups}
    return Format(config, packed.pack, others={"self_attn": compressed_tensors("float-quantized", attention).pack})


def fine_grained_fp8(block: tuple[int, int] | None, **config: Any) -> Format:
    """transformers' own."""
    pack = fp8(block or (None, None), "weight_scale_inv")
    return Format({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block} | config, pack)


def auto_fp8(**config: Any) -> Format:
    """AutoFP8's, with scales of activations and of the KV cache."""

    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        parts, dense = fp8((None, None))(weight, draw)
        return {name: part.view(()) if part.numel() == 1 else part for name, part in parts.items()}, dense

    also = {"input_scale": torch.tensor(0.25), "output_scale": torch.tensor(0.5)}
    return Format({"quant_method": "fp8", "activation_scheme": "static"} | config, pack, also)


# GPTQ and AWQ


def gptq(
    bits: int = 4,
    group_size: int = 32,
    *,
    desc_act: bool = False,
    sym: bool = True,
    layout: str = "gptq",
    stored_as: str | None = None,
    with_g_idx: bool = True,
) -> Format:
    """`stored_as`: what the zero points are really stored as."""
    block = (1, None if group_size == -1 else group_size)

    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        codes, scales, zeros, groups = quantize(
            weight, bits, block, symmetric=sym, act_order=desc_act, draw=draw, scale_dtype=torch.float16
        )
        zero_words = words(zeros.t(), bits)
        if (stored_as or layout) == "gptq":  # less 1, word by word: below 0 it borrows from the next number
            ones = sum(1 << shift for shift in range(0, 32, bits))
            zero_words = torch.from_numpy((zero_words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
        parts = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": zero_words.contiguous(),
            "scales": scales.t().contiguous(),
        }
        if with_g_idx:
            parts["g_idx"] = groups
        return parts, widened(codes, scales, zeros, block, groups)

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "checkpoint_format": layout,
        "damp_percent": 0.1,
        "true_sequential": True,
        "modules_in_block_to_quantize": [["self_attn.k_proj"]],
    }
    return Format(config, pack)


def awq(group_size: int = 32, *, symmetric: bool = False, **config: Any) -> Format:
    block = (1, None if group_size == -1 else group_size)

    def pack(weight: Tensor, draw: torch.Generator) -> tuple[Parts, Tensor]:
        codes, scales, zeros, _ = quantize(weight, 4, block, symmetric=symmetric, scale_dtype=torch.float16)
        parts = {
            "qweight": awq_words(codes.t()),
            "qzeros": awq_words(zeros.t()),
            "scales": scales.t().contiguous(),
        }
        return parts, widened(codes, scales, zeros, block)

    of_config = {"bits": 4, "group_size": group_size, "zero_point": not symmetric, "version": "gemm"}
    return Format({"quant_method": "awq", "modules_to_not_convert": ["gate"], **of_config, **config}, pack)


def words(codes: Tensor, bits: int) -> Tensor:
    """[R, n] → int32 [R, ⌈n · bits / 32⌉]: each row is one long number, the first code in its lowest bits."""
    each = 32 // bits
    padded = np.pad(codes.numpy().astype(np.uint32), ((0, 0), (0, -codes.shape[1] % each)))
    return _joined(padded.reshape(len(padded), -1, each), bits)


def awq_words(codes: Tensor) -> Tensor:
    """[R, n] → int32 [R, n / 8]: nibble i of a word is of output AWQ_ORDER[i] of its eight."""
    return _joined(codes.numpy().astype(np.uint32).reshape(len(codes), -1, 8)[:, :, AWQ_ORDER], 4)


def _joined(of_words: np.ndarray[Any, Any], bits: int) -> Tensor:
    """[R, words, n] → int32 [R, words], the first of n in the lowest bits."""
    shifts = np.arange(of_words.shape[2], dtype=np.uint32) * np.uint32(bits)
    joined = np.bitwise_or.reduce(of_words << shifts, axis=2)
    return torch.from_numpy(np.ascontiguousarray(joined).view(np.int32))


# Rounding to the nearest, which none of the readers cares about


def quantize(
    weight: Tensor,
    bits: int,
    block: tuple[Any, Any],
    *,
    symmetric: bool,
    act_order: bool = False,
    draw: torch.Generator | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [O, I] from 0, scales and zero points of blocks, the group of each input. Some zero points are 0."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=draw) if act_order else torch.arange(inputs)
    groups = torch.empty(inputs, dtype=torch.int32)
    groups[order] = (torch.arange(inputs) // (block[1] or inputs)).int()
    shuffled = weight[:, order]
    if symmetric:
        scales = of_blocks(shuffled, block, lambda part: part.abs().max() / (middle - 1)).to(scale_dtype)
        zeros = torch.full(scales.shape, middle)
    else:
        lowest = of_blocks(shuffled, block, lambda part: part.min())
        scales = of_blocks(shuffled, block, lambda part: (part.max() - part.min()) / top).to(scale_dtype)
        zeros = (-lowest / scales.float()).round().clamp(0, top).int()
        zeros[..., ::3] = 0
    wide_scales, wide_zeros = (spread(x.float(), block, weight.shape, groups) for x in (scales, zeros))
    codes = (weight / wide_scales + wide_zeros).round().clamp(0, top).int()
    return codes, scales, zeros, groups


def widened(
    codes: Tensor, scales: Tensor, zeros: Tensor, block: tuple[Any, Any], groups: Tensor | None = None
) -> Tensor:
    """What they stand for, in fp32."""
    scale, zero = (spread(x.float(), block, codes.shape, groups) for x in (scales, zeros))
    return (codes.float() - zero) * scale


def of_blocks(weight: Tensor, block: tuple[Any, Any], measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each block [rows, columns]."""
    rows = weight.split(block[0] or len(weight))
    return torch.stack(
        [torch.stack([measure(part) for part in row.split(block[1] or weight.shape[1], 1)]) for row in rows]
    )


def spread(of_block: Tensor, block: tuple[Any, Any], shape: torch.Size, groups: Tensor | None = None) -> Tensor:
    """Of each number of the matrix [O, I]."""
    by_row = of_block[torch.arange(shape[0]) // (block[0] or shape[0])]
    return by_row[:, torch.arange(shape[1]) // (block[1] or shape[1]) if groups is None else groups.long()]


def stored_scales(scales: Tensor, block: tuple[Any, Any]) -> Tensor:
    """One scale is a vector of one."""
    return scales.flatten() if block == (None, None) else scales


# The checkpoint


def write_quantized(
    directory: Path,
    of: Format,
    *,
    dense: bool = False,
    rename: Callable[[str], str] = lambda name: name,
    seed: int = 0,
    **config_overrides: Any,
) -> CausalLM:
    """Write a quantised random Mixtral, or a Mistral with `dense`; returns the model of what it stands for, in fp32."""
    sizes = SIZES | config_overrides
    model: CausalLM = random_mistral(seed=seed, **sizes) if dense else random_mixtral(seed=seed, **sizes)
    _load(model, _write(directory, of, model, rename=rename, seed=seed))
    return model


def write_quantized_family(directory: Path, of: Format, model: PreTrainedModel) -> PreTrainedModel:
    """Write a model of any family quantised, by the names that the hub has; returns what it stands for, in fp32."""
    plain = directory / "plain"
    model.save_pretrained(plain, save_original_format=True)
    wide = _write(directory, of, model, tensors=load_file(plain / "model.safetensors"))
    save_file(wide, plain / "model.safetensors", metadata={"format": "pt"})
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plain).eval()
    return reference


def write_quantized_demo(directory: Path, of: Format) -> CausalLM:
    """Write the demo model quantised, with its tokenizer and template; returns the model of what it stands for."""
    shutil.copytree(DIRECTORY, directory, ignore=shutil.ignore_patterns("dense", "training", "*.py", "*.safetensors"))
    model: CausalLM = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    wide = _write(directory, of, model)
    _load(model.float(), wide)
    return model


def _write(
    directory: Path,
    of: Format,
    model: PreTrainedModel,
    *,
    tensors: dict[str, Tensor] | None = None,
    rename: Callable[[str], str] = lambda name: name,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns what it stands for, by the hub's names."""
    draw = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, tensor in (hub_state_dict(model) if tensors is None else tensors).items():
        module = name.removesuffix(".weight")
        wide[name] = tensor
        if tensor.dim() == 2 and module != "model.embed_tokens" and of.packs(module):
            parts, wide[name] = of.pack_of(module)(tensor, draw)
            stored |= {rename(f"{module}.{suffix}"): part.clone() for suffix, part in (parts | of.also).items()}
        else:
            stored[rename(name)] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": of.config}))
    return wide


def _load(model: CausalLM, hub: dict[str, Tensor]) -> None:
    """Put tensors under the hub's names into a model that has the experts of a layer in one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            prefix = name.replace(".mlp.", ".block_sparse_moe.")
            if name.endswith("experts.gate_up_proj"):
                for expert, both in enumerate(parameter):
                    w1, w3 = (hub[prefix.replace("gate_up_proj", f"{expert}.{w}.weight")] for w in ("w1", "w3"))
                    both.copy_(torch.cat((w1, w3)))
            elif name.endswith("experts.down_proj"):
                for expert, w2 in enumerate(parameter):
                    w2.copy_(hub[prefix.replace("down_proj", f"{expert}.w2.weight")])
            else:
                parameter.copy_(hub[name if name in hub else prefix])
