"""Starts the kernel of what is between the products of a feed-forward network (swiglu_kernel.py)."""

from __future__ import annotations

from torch import Tensor

from experts_service.kernels.gpu import swiglu_kernel
from experts_service.kernels.gpu.launch import launch

_WIDTH = 1024  # of a row that a program does


def silu_product(gate_up: Tensor) -> Tensor:
    """silu(gate) · up [R, F] of rows [R, 2 F] of both."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = gate_up.new_empty(num_rows, width)
    grid = (num_rows, -(-width // _WIDTH))
    launch(swiglu_kernel.silu_product, grid, gate_up.contiguous(), hidden, width, _WIDTH)
    return hidden
