"""Builds an engine for the checkpoint of its argument and says how many threads torch computes with."""

import sys
from pathlib import Path

import torch

from tests.router_service.engines import Bench

Bench(Path(sys.argv[1]), num_threads=None)
print(torch.get_num_threads())
