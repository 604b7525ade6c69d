"""What weights take in memory: of a quantised checkpoint what its kernels hold, of any other what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.checkpoint.architecture import expert_tensors
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.config import EngineConfig, ModelConfig
from cluster.deploy.app import Cluster, plan_model
from cluster.errors import DoesNotFit
from cluster.kubernetes.sizes import model_size
from cluster.planning.placement import Node, WeightBytes
from cluster.planning.weights import held_bytes, held_weights
from experts_service.kernels.gpu.matrices import Matrices
from experts_service.weights import read_tensors
from tests.checkpoints import write_checkpoint
from tests.quantized_checkpoints import Format, compressed_tensors, fine_grained_fp8, gptq, write_quantized

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_local_experts": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_plain_checkpoint_it_is_the_arithmetic_of_its_sizes(tmp_path: Path, dtype: Any):
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert held_weights(checkpoint, dtype, "cpu") == WeightBytes.of(checkpoint.architecture, dtype)


@pytest.mark.parametrize(
    ("of", "bytes_of_a_weight"),
    [
        (compressed_tensors("pack-quantized", INT4), 0.5 + 4 / 32),
        (compressed_tensors("pack-quantized", INT4 | {"symmetric": False}), 0.5 + 6 / 32),
        (gptq(8), 1 + 4 / 32),
        (gptq(sym=False), 0.5 + 6 / 32),
        (fine_grained_fp8((32, 32)), 1 + 4 / 32),
        (fine_grained_fp8((32, 40)), 2),  # rows are not whole groups
    ],
    ids=["int4", "int4-asymmetric", "gptq-8", "gptq-4-asymmetric", "fp8", "fp8-of-other-groups"],
)
def test_of_a_quantised_one_it_is_what_kernels_hold(tmp_path: Path, of: Format, bytes_of_a_weight: float):
    write_quantized(tmp_path, of, **SIZES)
    checkpoint = open_checkpoint(tmp_path)
    weights = 2 * 3 * 64 * 96  # of one expert
    held = held_weights(checkpoint, "bfloat16", "cpu")
    assert held.expert == weights * bytes_of_a_weight
    widened = WeightBytes.of(checkpoint.architecture, "bfloat16")
    attention = 2 * 2 * 64 * (64 + 32)  # of two layers: q and o have 64 outputs or inputs, k and v 32
    assert widened.coordinator - held.coordinator == attention * (2 - bytes_of_a_weight)
    assert held_weights(checkpoint, "float32", "cpu") == WeightBytes.of(checkpoint.architecture, "float32")
    on_gpu = held_weights(checkpoint, "bfloat16", "cuda")
    assert on_gpu == held if bytes_of_a_weight < 2 else on_gpu.expert < 0.85 * widened.expert  # of 40 inputs 48
    assert held_weights(checkpoint, "float32", "cuda").expert == on_gpu.expert


def test_on_a_gpu_groups_are_filled_up_to_what_its_kernels_take_at_least(tmp_path: Path):
    write_checkpoint(tmp_path)
    rounding = EngineConfig(quantization="int4", quantization_group_size=16).rounding
    checkpoint = open_checkpoint(tmp_path).rounded(rounding)
    names = expert_tensors(checkpoint.architecture, 0, 0)
    weights = read_tensors(checkpoint, names, dtype=torch.bfloat16)
    for name, weight in weights.items():
        matrices = Matrices.pack([(weight,)])
        assert matrices.scales is not None
        held = matrices.weights.nbytes + matrices.scales.nbytes
        assert held == held_bytes(checkpoint.tensors[name], "bfloat16", "cuda")
        assert held > 1.7 * held_bytes(checkpoint.tensors[name], "bfloat16", "cpu")


def test_a_model_fits_by_what_it_holds_and_a_pod_is_as_large(tmp_path: Path):
    """In 4 bits it takes a third of the memory that it takes widened: it fits a node where that would not."""
    write_quantized(
        tmp_path, compressed_tensors("pack-quantized", INT4), dense=True, hidden_size=128, num_hidden_layers=2
    )
    checkpoint = open_checkpoint(tmp_path)
    config = ModelConfig(
        name="m", path=str(tmp_path), engine=EngineConfig(device="cpu", dtype="bfloat16", max_model_len=16)
    )
    held, widened = (
        held_weights(checkpoint, "bfloat16", "cpu").coordinator,
        WeightBytes.of(checkpoint.architecture, "bfloat16").coordinator,
    )
    assert held < 0.5 * widened
    process = 460 * 10**6
    memory = process + (held + widened) // 2
    plan_model(config, checkpoint, Cluster(1, (Node("a", memory),)))
    with pytest.raises(DoesNotFit):
        plan_model(
            config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "float32"})}),
            checkpoint,
            Cluster(1, (Node("a", memory),)),
        )
    size = model_size(config)
    in_fp32 = model_size(config.model_copy(update={"engine": EngineConfig(device="cpu", dtype="float32")}))
    assert in_fp32.coordinator_host_bytes() - size.coordinator_host_bytes() == 2 * widened - held
    stored = sum(ref.nbytes for ref in checkpoint.tensors.values())
    assert size.weight_bytes == stored
    assert stored == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.05)  # its header
