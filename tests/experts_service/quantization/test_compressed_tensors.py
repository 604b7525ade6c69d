"""Models that compressed-tensors itself wrote, config and files, are read to the numbers that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.checkpoint.checkpoint import open_checkpoint
from experts_service.quantization.weight import QuantizedWeight, dense
from experts_service.weights import read_tensors
from tests.checkpoints import random_mistral

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def of_blocks(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number of what shares a scale, in the scales' shape."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    blocks = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
    low, high = blocks.amin(-1), blocks.amax(-1)
    return (low.view(1), high.view(1)) if args.strategy == "tensor" else (low, high)


@pytest.mark.parametrize(
    ("layout", "weights", "activations"),
    [
        ("pack-quantized", INT4, None),
        ("pack-quantized", INT4 | {"symmetric": False}, None),
        ("pack-quantized", INT8, None),
        ("pack-quantized", INT8 | {"symmetric": False}, None),
        ("int-quantized", INT8, TOKEN | {"type": "int"}),
        ("int-quantized", INT8 | {"symmetric": False}, TOKEN | {"type": "int"}),
        ("naive-quantized", INT4 | {"num_bits": 8, "symmetric": False}, None),
        ("float-quantized", FP8, TOKEN),
        ("float-quantized", FP8 | {"strategy": "tensor"}, TOKEN | {"strategy": "tensor", "dynamic": False}),
        ("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}, TOKEN),
    ],
)
def test_what_the_library_writes_is_read_as_it_reads_it(
    tmp_path: Path, layout: str, weights: dict[str, Any], activations: dict[str, Any] | None
):
    model = random_mistral(hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=1)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": layout}
    config = QuantizationConfig(config_groups={"group_0": group}, format=layout, ignore=["lm_head"])
    apply_quantization_config(model, config)
    expected: dict[str, torch.Tensor] = {}
    for module in model.modules():
        if is_module_quantized(module):
            scheme = module.quantization_scheme
            scale, zero_point = calculate_qparams(*of_blocks(module.weight.data, scheme.weights), scheme.weights)
            module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point.view(module.weight_zero_point.shape))
    ModelCompressor(config).compress_model(model)
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if is_module_quantized(module):
            parts = {part.removeprefix(f"{name}."): t for part, t in stored.items() if part.startswith(f"{name}.")}
            compressor = BaseCompressor.get_value_from_registry(layout)
            expected[f"{name}.weight"] = compressor.decompress(parts, module.quantization_scheme)["weight"]
    assert len(expected) == 7
    save_file(stored, tmp_path / "model.safetensors")
    document = json.loads(model.config.to_json_string(use_diff=False))
    document["quantization_config"] = json.loads(config.model_dump_json())
    (tmp_path / "config.json").write_text(json.dumps(document))
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    for name, wide in expected.items():
        assert isinstance(tensors[name], QuantizedWeight), name
        assert torch.equal(dense(tensors[name]), wide.float()), name
