"""Starts the kernels of what is done to rows on a GPU (gpu_row_kernels.py). Knows tensors; knows no layer.

Imported where there is a GPU: Triton takes a second. Products and sums are not fused: they are rounded as torch's.

Shapes: T tokens, D hidden size, N heads, H head_dim, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts_service.kernels.gpu.launch import launch
from router_service import gpu_row_kernels as kernels

_HEADS = 8  # of a program that rotates
_WIDTH = 1024  # of a row that a program combines
_PAIRS = 1024  # that a program looks at together
_NUMBERS_OF_WARP = 512


def norm(x: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None) -> Tensor:
    """See rows.py."""
    assert x.is_contiguous(), "it is written to"
    rows = torch.empty_like(x)
    width = x.shape[1]
    block = _block(width)
    delta = None if delta is None else delta.contiguous()
    warps = min(16, max(1, block // _NUMBERS_OF_WARP))
    launch(kernels.norm, (len(x),), x, delta, weight, rows, epsilon, width, block, num_warps=warps)
    return rows


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """See rows.py; `x` itself is changed."""
    num_rows, num_heads, head_dim = x.shape
    half = head_dim // 2
    grid = (num_rows, -(-num_heads // _HEADS))
    launch(
        kernels.rotate, grid, x, cosines, sines, x.stride(0), num_heads, half, _HEADS, _block(half),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return x


def choose(scores: Tensor, top_k: int, *, renormalised: bool = True) -> tuple[Tensor, Tensor]:
    """See rows.py; of equal ones the first."""
    num_rows, num_experts = scores.shape
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=scores.device)
    experts = torch.empty(num_rows, top_k, dtype=torch.int64, device=scores.device)
    blocks = _block(num_experts), _block(top_k)
    launch(
        kernels.choose, (num_rows,), scores.contiguous(), weights, experts, renormalised, num_experts, top_k, *blocks,
        num_warps=1,
    )  # fmt: skip
    return weights, experts


def route(
    experts: Tensor, ranks: Tensor, ends_so_far: Tensor, num_real: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row indices, ends and places: see routing.py."""
    num_rows, top_k = experts.shape
    row_indices, places = (experts.new_empty(experts.numel()) for _ in range(2))
    ends = torch.empty(len(ranks), dtype=torch.int32, device=ranks.device)
    launch(
        kernels.route, (len(ranks) + (num_real is not None),), experts.contiguous(), ranks, row_indices, places,
        ends, ends_so_far, num_real, num_rows, len(ranks), top_k, _PAIRS,
    )  # fmt: skip
    return row_indices, ends, places


def combine(answers: Tensor, weights: Tensor, experts: Tensor, places: Tensor, num_experts: int) -> Tensor:
    """See routing.py."""
    num_rows, top_k = experts.shape
    width = answers.shape[1]
    totals = answers.new_empty(num_rows, width)
    block = min(_WIDTH, _block(width))
    launch(
        kernels.combine, (num_rows, -(-width // block)), answers, weights.contiguous(), experts.contiguous(), places,
        totals, num_rows, num_experts, width, top_k, block, enable_fp_fusion=False,
    )  # fmt: skip
    return totals


def _block(width: int) -> int:
    """The power of two that it fits."""
    return 1 << (width - 1).bit_length()
