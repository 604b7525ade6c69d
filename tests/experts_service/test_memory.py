from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    told = json.loads(said_by("load_experts", tmp_path))
    assert nbytes < told["grown_by"] < 1.3 * nbytes + 2**24
