"""Rows times the matrices they belong to, on a device, without the host. Knows tiles; knows no layer.

    x     [R, K]  rows in the order of their matrices
    ends  [E]     int32, on the device: the end of each matrix' rows. Rows after the last are left undefined
    y     [R, N]  each sum is rounded once

The host knows how many rows there are at most, and not whose: programs find that out. A row has the same bits alone, in
any batch and in any place of it, on one kind of GPU. That needs an order of sums which hangs on the matrix alone, and
tensor cores that add up a block alike whether a tile has 16 rows or 64: the rows are the narrow side of their
instruction, and the others, outputs × k, are one for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts_service.kernels.gpu.launch import launch
from experts_service.kernels.gpu.matrices import Matrices

FEW_ROWS, MANY_ROWS = 16, 64  # of a tile
TILE_OUTPUTS = 128  # gated: of both halves together
_FULL_GPU = 128  # programs of one matrix; more of them for fewer k each would only add up more parts
_MOST_PARTS = 8
_LEAST_BLOCKS = 8  # of a part: the first are waited for
_ADDED_AT_ONCE = 1024  # outputs of a program that adds up parts
_WARPS = {FEW_ROWS: 4, MANY_ROWS: 8}  # by fours: Hopper's wide instruction needs them
_STAGES = {FEW_ROWS: 4, MANY_ROWS: 3}  # what is on its way fits the 99 KiB of the smallest card


def multiply(x: Tensor, matrices: Matrices, ends: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """`y` [R, N], new unless given: the rows of each matrix times it. Without `ends` there is one matrix."""
    return _multiply(x, matrices, ends, y, gated=False)


def gate_up(x: Tensor, matrices: Matrices, ends: Tensor | None = None) -> Tensor:
    """silu(w1 x) · (w3 x) [R, F]; each matrix [2 F, K] is w1 above w3.

    Both products, silu and what is multiplied are rounded to the rows' dtype, as in the reference.
    """
    return _multiply(x, matrices, ends, None, gated=True)


def few_and_many(num_matrices: int) -> tuple[int, int]:
    """Numbers of rows that between them start every kernel there is for so many matrices, and for one."""
    return 1, FEW_ROWS * num_matrices + 1


def num_parts(out_features: int, blocks: int, tile_outputs: int) -> int:
    """Into how many the sum over k is cut: so that one matrix and few rows keep a GPU busy, or nearly."""
    parts, programs = 1, -(-out_features // tile_outputs)
    while parts < _MOST_PARTS and parts * programs < _FULL_GPU and blocks >= 2 * parts * _LEAST_BLOCKS:
        parts *= 2
    return parts


def num_tiles(num_rows: int, num_matrices: int, tile_rows: int) -> int:
    """Of rows, at most, whosever they are: every matrix with rows may have a tile that is not full."""
    with_rows = min(num_rows, num_matrices)
    return (num_rows + with_rows * (tile_rows - 1)) // tile_rows


def _multiply(x: Tensor, matrices: Matrices, ends: Tensor | None, y: Tensor | None, *, gated: bool) -> Tensor:
    from experts_service.kernels.gpu.product_kernels import KERNELS

    num_rows, halves = x.shape[0], 2 if gated else 1
    out_features = matrices.out_features // halves
    if y is None:
        y = x.new_empty(num_rows, out_features)
    if not num_rows:
        return y
    x = x.contiguous()
    blocks = -(-matrices.width // matrices.block)
    tile_outputs = TILE_OUTPUTS // halves
    parts = num_parts(out_features, blocks, tile_outputs)
    few = num_rows <= FEW_ROWS * matrices.num_matrices
    tile_rows = FEW_ROWS if few else MANY_ROWS
    split = few and parts > 1
    sums = y if not split else torch.empty(parts, num_rows, halves * out_features, dtype=torch.float32, device=x.device)
    grid = (
        num_tiles(num_rows, matrices.num_matrices, tile_rows),
        -(-out_features // tile_outputs),
        parts if split else 1,
    )
    launch(
        KERNELS["multiply"],
        grid,
        x,
        matrices.weights,
        matrices.scales,
        matrices.zeros,
        matrices.columns,
        ends,
        sums,
        num_rows,
        matrices.num_matrices,
        out_features,
        matrices.in_features,
        matrices.width,
        matrices.blocks_of_group,
        matrices.kind,
        gated,
        parts,
        split,
        tile_rows,
        tile_outputs,
        matrices.block,
        num_warps=_WARPS[tile_rows],
        num_stages=_STAGES[tile_rows],
    )
    if split:
        added = (num_rows, -(-out_features // _ADDED_AT_ONCE))
        launch(KERNELS["add_parts"], added, sums, y, num_rows, out_features, gated, parts, _ADDED_AT_ONCE)
    return y
