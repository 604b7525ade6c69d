"""Random tiny checkpoints as the hub has gpt-oss, in MXFP4, and DeepSeek-V3, in FP8; how transformers loads them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from tests.transformers_families import random_model, tiny_config

FP8_BLOCK = (8, 8)
_FP8_MAX = 448.0
_OF_FP8 = re.compile(r"\.(mlp|self_attn)\..*_proj(_with_mqa)?\.weight$")
_MXFP4_NAME = re.compile(r"\.experts\.(gate_up|down)_proj$")


def write_mxfp4(directory: Path) -> None:
    """gpt-oss. Codes are any, scales such that numbers are of the size that weights are."""
    config = tiny_config("gpt_oss")
    config.hidden_size, config.intermediate_size = 64, 32
    random_model(config).save_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not _MXFP4_NAME.search(name):
            tensors[name] = tensor.bfloat16()
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8)
    _save(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def write_fp8(directory: Path, model_type: str = "deepseek_v3") -> None:
    """Its projections are in FP8, with a scale for each block."""
    random_model(tiny_config(model_type)).save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not _OF_FP8.search(name):
            tensors[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            continue
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor, FP8_BLOCK)
    _save(
        directory,
        tensors,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
        },
    )


def to_fp8(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and its scales, of blocks of which the last have fewer rows and columns."""
    grid = [math.ceil(size / of_block) for size, of_block in zip(matrix.shape, block, strict=True)]
    codes, scales = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn), torch.empty(*grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = matrix[part].abs().max() / _FP8_MAX
            codes[part] = (matrix[part] / scales[row, column]).to(torch.float8_e4m3fn)
    return codes, scales


def by_transformers(directory: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with weights as transformers dequantises them."""
    # Of accelerate, which is not needed for this, it asks only whether it is there.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    method = json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"]
    plain = Mxfp4Config(dequantize=True) if method == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=plain)
    return model.eval()


def _save(directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization, "dtype": "bfloat16"}
    file.write_text(json.dumps(config))
