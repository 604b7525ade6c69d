"""Rows times the matrices they belong to, on a device, without the host. Knows tiles; knows no layer.

    x     [R, K]  rows in the order of their matrices
    ends  [E]     int32, on the device: the end of each matrix' rows. Rows after the last are left undefined
    y     [R, N]  each sum is rounded once

The host knows how many rows there are at most, and not whose: programs find that out. A row has the same bits alone, in
any batch and in any place of it, on one kind of GPU. That needs an order of sums which hangs on the matrix alone, and
on whether there are others (`num_parts`); and tensor cores that add up a block alike whether a tile has 16 rows or 128:
the rows are the narrow side of their instruction, and the others, outputs × k, are one for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from experts_service.kernels.gpu.launch import launch
from experts_service.kernels.gpu.matrices import PLAIN, Matrices

FEW_ROWS = 16  # of a tile
_FULL_GPU = 128  # programs of few rows; more of them for fewer k each would only add up more parts
_MOST_PARTS = 8
_LEAST_BLOCKS = 4  # of a part: the first are waited for
_ADDED_AT_ONCE = 1024  # outputs of a program that adds up parts
_TILES_TOGETHER = 8  # of rows
_LARGE_CARDS = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}  # whose blocks of threads have 160 KiB of shared memory


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program is cut, and what it keeps on its way. No row's bits hang on it.

    That is so while a tensor core's instruction is one for all: each half of `outputs` is 64 at least.
    """

    rows: int
    outputs: int  # gated: of both halves together
    block_bytes: int  # of a row of plain weights, multiplied at once; small numbers: a whole block
    warps: int  # by fours: Hopper's wide instruction needs them
    stages: int


class Tiles(NamedTuple):
    """Of few rows; of few where that many outputs would leave a GPU idle; of many rows."""

    few: Tile
    few_narrow: Tile
    many: Tile


# Measured on an H100 with Mixtral 8x7B's experts: docs/benchmarks.md.
_PLAIN = Tiles(Tile(FEW_ROWS, 128, 256, 4, 4), Tile(FEW_ROWS, 64, 256, 4, 6), Tile(128, 256, 128, 8, 4))
_PLAIN_SMALL = Tiles(Tile(FEW_ROWS, 128, 128, 4, 4), Tile(FEW_ROWS, 64, 128, 4, 6), Tile(64, 128, 128, 8, 3))  # 99 KiB
_WIDENED = Tiles(Tile(FEW_ROWS, 128, 0, 4, 3), Tile(FEW_ROWS, 128, 0, 4, 3), Tile(64, 128, 0, 4, 3))


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


def num_parts(out_features: int, blocks: int, num_matrices: int, *, is_plain: bool) -> int:
    """Into how many the sum over k is cut: so that few rows keep a GPU busy, or nearly.

    They are of one matrix, or where there are several of two at least. To widen small numbers takes more programs.
    """
    programs = -(-out_features // 64) * min(num_matrices, 2) if is_plain else -(-out_features // 128)
    parts = 1
    while parts < _MOST_PARTS and parts * programs < _FULL_GPU and blocks >= 2 * parts * _LEAST_BLOCKS:
        parts *= 2
    return parts


def num_tiles(num_rows: int, num_matrices: int, tile_rows: int) -> int:
    """Of rows, at most, whosever they are: every matrix with rows may have a tile that is not full."""
    with_rows = min(num_rows, num_matrices)
    return (num_rows + with_rows * (tile_rows - 1)) // tile_rows


def tiles(matrices: Matrices) -> Tiles:
    """What they are multiplied in."""
    return _tiles(matrices.weights.device, is_plain=matrices.kind == PLAIN)


@cache
def _tiles(device: torch.device, *, is_plain: bool) -> Tiles:
    if not is_plain:
        return _WIDENED
    is_large = device.type == "cuda" and torch.cuda.get_device_capability(device) in _LARGE_CARDS
    return _PLAIN if is_large else _PLAIN_SMALL


def _tile(matrices: Matrices, num_rows: int, *, gated: bool) -> Tile:
    """Of so many rows."""
    of = tiles(matrices)
    if num_rows > FEW_ROWS * matrices.num_matrices:
        return of.many
    is_narrow = -(-matrices.out_features // of.few.outputs) * min(matrices.num_matrices, 2) < _FULL_GPU
    return of.few_narrow if is_narrow and not gated else of.few


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
    is_plain = matrices.kind == PLAIN
    parts = num_parts(matrices.out_features, blocks, matrices.num_matrices, is_plain=is_plain)
    tile = _tile(matrices, num_rows, gated=gated)
    tile_outputs = tile.outputs // halves
    split = tile.rows == FEW_ROWS and parts > 1
    sums = y if not split else torch.empty(parts, num_rows, halves * out_features, dtype=torch.float32, device=x.device)
    row_tiles = num_tiles(num_rows, matrices.num_matrices, tile.rows)
    launch(
        KERNELS["multiply"],
        (row_tiles * -(-out_features // tile_outputs), parts if split else 1, 1),
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
        -(-blocks // parts) * matrices.block,
        matrices.blocks_of_group * matrices.block,
        matrices.kind,
        gated,
        parts,
        split,
        tile.rows,
        tile_outputs,
        min(matrices.block, tile.block_bytes // matrices.dtype.itemsize) if is_plain else matrices.block,
        _TILES_TOGETHER,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # else a part times its scale is rounded here, and is not where parts are one program's
    )
    if split:
        added = (num_rows, -(-out_features // _ADDED_AT_ONCE), 1)
        launch(KERNELS["add_parts"], added, sums, y, num_rows, out_features, gated, parts, _ADDED_AT_ONCE)
    return y
