"""Loads all experts of the bf16 checkpoint in a directory, and says as JSON how many bytes of memory that took."""

from __future__ import annotations

import json
import sys

import psutil
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from experts_service.kernels.experts import Experts
from experts_service.kernels.matmul import load_kernels


def main() -> None:
    checkpoint = open_checkpoint(sys.argv[1])
    load_kernels()
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
