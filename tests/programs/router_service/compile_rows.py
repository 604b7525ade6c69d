"""Kernels of what is done to rows as cards would run them, compiled; what each takes. argv: capability, dtype."""

import json
import sys

import torch

from experts_service.kernels.gpu import silu
from router_service import gpu_rows
from tests.triton_compiler import compile_for

NUM_EXPERTS, TOP_K, HIDDEN, HEADS, HEAD_DIM = 8, 2, 4096, 40, 128  # Mixtral's
capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
shared = {}


def compiled(kernel, grid, *arguments, **constants):  # type: ignore[no-untyped-def]
    made = compile_for(capability, kernel, arguments, constants)
    assert made.binary, made.name
    shared[made.name] = made.shared


gpu_rows.launch = silu.launch = compiled
for num_rows in (1, 5):
    x = torch.zeros(num_rows, HIDDEN, dtype=dtype)
    weight, angles = torch.ones(HIDDEN, dtype=dtype), torch.zeros(num_rows, HEAD_DIM, dtype=dtype)
    gpu_rows.norm(x, weight, 1e-5, None)
    gpu_rows.norm(x, weight, 1e-5, x)
    gpu_rows.rotate(torch.zeros(num_rows, HEADS, HEAD_DIM, dtype=dtype), angles, angles)
    weights, experts = gpu_rows.choose(torch.zeros(num_rows, NUM_EXPERTS, dtype=dtype), TOP_K)
    of_experts = torch.arange(NUM_EXPERTS), torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    gpu_rows.route(experts, *of_experts, torch.tensor([1]))
    places = gpu_rows.route(experts, *of_experts)[2]
    answers = torch.zeros(num_rows * TOP_K, HIDDEN, dtype=dtype)
    gpu_rows.combine(answers, weights, experts, places, NUM_EXPERTS)
    silu.silu_product(torch.zeros(num_rows, 2 * HIDDEN, dtype=dtype))
print(json.dumps(shared))
