"""Attention, compiled for a card; says what each kernel takes. argv: capability, dtype, head_dim, heads that share."""

import json
import sys

import torch

from router_service.attention import triton_paged
from tests.router_service.attention.pages import sized
from tests.triton_compiler import compile_for

capability, dtype, head_dim, heads = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shared = {}


def compiled(kernel, grid, *arguments, **constants):  # type: ignore[no-untyped-def]
    made = compile_for(capability, kernel, arguments, constants)
    assert made.binary, made.name
    shared[made.name] = made.shared


triton_paged.launch = compiled
architecture = sized(num_heads=8 * heads, num_kv_heads=8, head_dim=head_dim)
assert triton_paged.is_served(architecture, dtype)
triton_paged.TritonAttention(architecture, block_size=16, dtype=dtype, device=torch.device("cpu")).warm_up()
print(json.dumps(shared))
