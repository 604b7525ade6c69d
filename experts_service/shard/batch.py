"""One call of the maths for the rows of several frames. Knows tensors and counts; knows no socket and no frame.

frame a: counts (2, 1)   a0 a1 | a2            merged: counts (3, 3)   a0 a1 b0 | a2 b1 b2
frame b: counts (1, 2)   b0    | b1 b2         all rows of one expert stand together, as in one frame
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experts_service.device import pinned

Maths = Callable[[int, Tensor, Sequence[int]], Tensor]  # layer, rows [R, D], counts [E] → answers [R, D]


def run_as_one(
    maths: Maths, layer: int, batches: Sequence[tuple[Tensor, tuple[int, ...]]], *, for_gpu: bool = False
) -> list[Tensor]:  # each [R, D], contiguous
    """The answers to each of `batches` (rows [R, D] by expert, counts [E]), worked out in one call.

    `for_gpu`: rows are merged in memory that a GPU copies from by itself.
    """
    if len(batches) == 1:
        rows, counts = batches[0]
        return [maths(layer, rows, counts).contiguous()]
    num_experts = len(batches[0][1])
    pieces: list[Tensor] = []
    places: list[list[tuple[int, int]]] = [[] for _ in batches]  # of each batch's pieces in the merged rows
    starts = [0] * len(batches)
    merged_counts = []
    total = 0
    for expert in range(num_experts):
        before = total
        for index, (rows, counts) in enumerate(batches):
            if count := counts[expert]:
                pieces.append(rows[starts[index] : starts[index] + count])
                places[index].append((total, total + count))
                starts[index] += count
                total += count
        merged_counts.append(total - before)
    merged = torch.cat(pieces, out=pinned((total, pieces[0].shape[1]), pieces[0].dtype) if for_gpu else None)
    answer = maths(layer, merged, tuple(merged_counts))  # [R of all, D]
    return [_gathered(answer, ranges) for ranges in places]


def _gathered(answer: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    if len(ranges) == 1:
        start, end = ranges[0]
        return answer[start:end].contiguous()
    return torch.cat([answer[start:end] for start, end in ranges])
