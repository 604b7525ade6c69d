"""Loads all experts of a checkpoint in bf16, rounded where that is said, and says as JSON how many bytes that took."""

from __future__ import annotations

import json
import sys
from typing import cast

import psutil
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.rounding import Numbers, Rounding
from experts_service.kernels.compiled import quantized_matmul
from experts_service.kernels.compiled.matmul import load_kernels
from experts_service.kernels.experts import Experts


def main() -> None:
    directory, *numbers = sys.argv[1:]
    rounding = Rounding.to(cast("Numbers", numbers[0]), 128, "experts") if numbers else None
    checkpoint = open_checkpoint(directory).rounded(rounding)
    load_kernels()
    quantized_matmul.load_kernels()
    torch.ones(1).add_(1)  # what starts with the first tensor
    before = psutil.Process().memory_info().rss
    experts = Experts.load(
        checkpoint,
        range(checkpoint.architecture.num_experts),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    print(json.dumps({"grown_by": psutil.Process().memory_info().rss - before, "layers": experts.num_layers}))


if __name__ == "__main__":
    main()
