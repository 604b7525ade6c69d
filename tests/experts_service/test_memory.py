from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.rounding import Numbers, Rounding
from cluster.planning.placement import KNOWN_ROWS_BYTES
from cluster.planning.weights import held_weights
from experts_service.kernels.compiled import jit
from experts_service.kernels.swiglu import Prepared
from experts_service.loaded_experts import load_experts
from experts_service.shard.serve_kernel import MOST_KNOWN
from tests.checkpoints import write_checkpoint
from tests.programs import said_by


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_is_read_and_dropped_while_experts_load_goes_back(tmp_path: Path, stored: torch.dtype) -> None:
    """malloc kept as much again as the weights take: it lay between them."""
    write_checkpoint(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_local_experts=8)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    nbytes = 2 * sum(tensor.numel() for name, tensor in tensors.items() if "experts" in name)  # in bf16
    told = json.loads(said_by("experts_service.load_experts", tmp_path))
    assert nbytes < told["grown_by"] < 1.3 * nbytes + 2**24


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: weights are widened")
@pytest.mark.parametrize("numbers", ["int8", *(pytest.param(name, marks=pytest.mark.long) for name in ("int4", "fp8"))])
def test_what_rounding_and_packing_need_for_a_moment_goes_back(tmp_path: Path, numbers: Numbers) -> None:
    """Half as much again as the weights of 8 bits stayed with malloc until the process ended."""
    write_checkpoint(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_local_experts=8)
    checkpoint = open_checkpoint(tmp_path).rounded(Rounding.to(numbers, 128, "experts"))
    held = 8 * held_weights(checkpoint, "bfloat16", "cpu").expert
    assert held < checkpoint.architecture.num_layers * 8 * 3 * 512 * 2048 * 1.1
    told = json.loads(said_by("experts_service.load_experts", tmp_path, numbers))
    assert held < told["grown_by"] < 1.15 * held + 2**24


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: Python runs all rows")
def test_what_a_shard_keeps_of_kinds_of_rows_is_what_plans_count(tmp_path: Path) -> None:
    """However many experts have rows: each kind kept jobs of its own for all of them."""
    number = 64
    write_checkpoint(tmp_path, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=number)
    checkpoint = open_checkpoint(tmp_path).rounded(Rounding.to("int8", 32, "experts"))
    experts = load_experts(checkpoint, range(number), dtype=torch.bfloat16, device=torch.device("cpu"))
    rows, process = torch.zeros(number, 64, dtype=torch.bfloat16), psutil.Process()

    def prepared() -> Prepared:
        made = experts.prepared(0, rows, (1,) * number, rows)
        assert made is not None
        return made

    prepared()
    before = process.memory_info().rss
    kept = [prepared() for _ in range(MOST_KNOWN)]
    assert process.memory_info().rss - before < KNOWN_ROWS_BYTES, len(kept)
