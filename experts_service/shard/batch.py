"""One call of the maths for the rows of several frames. Knows tensors and counts; knows no socket and no frame.

frame a: counts (2, 1)   a0 a1 | a2            merged: counts (3, 3)   a0 a1 b0 | a2 b1 b2
frame b: counts (1, 2)   b0    | b1 b2         all rows of one expert stand together, as in one frame
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experts_service.device import pinned

# layer, rows [R, D], counts [E], where the answers may be written → answers [R, D], there or in memory of their own
Maths = Callable[[int, Tensor, Sequence[int], Tensor | None], Tensor]
Batch = tuple[Tensor, tuple[int, ...], Tensor | None]  # rows [R, D] by expert, counts [E], where the answers belong


def run_as_one(
    maths: Maths, layer: int, batches: Sequence[Batch], *, for_gpu: bool = False
) -> list[Tensor]:  # each [R, D], contiguous
    """The answers to each of `batches`, worked out in one call: where they belong, or in new memory if that is nowhere.

    `for_gpu`: rows are merged in memory that a GPU copies from by itself.
    """
    if len(batches) == 1:
        rows, counts, place = batches[0]
        answer = maths(layer, rows, counts, place)
        return [answer if answer is place else _gathered(answer, [(0, len(rows))], place)]
    num_experts = len(batches[0][1])
    pieces: list[Tensor] = []
    places: list[list[tuple[int, int]]] = [[] for _ in batches]  # of each batch's pieces in the merged rows
    starts = [0] * len(batches)
    merged_counts = []
    total = 0
    for expert in range(num_experts):
        before = total
        for index, (rows, counts, _) in enumerate(batches):
            if count := counts[expert]:
                pieces.append(rows[starts[index] : starts[index] + count])
                places[index].append((total, total + count))
                starts[index] += count
                total += count
        merged_counts.append(total - before)
    merged = torch.cat(pieces, out=pinned((total, pieces[0].shape[1]), pieces[0].dtype) if for_gpu else None)
    answer = maths(layer, merged, tuple(merged_counts), None)  # [R of all, D]
    return [_gathered(answer, ranges, place) for ranges, (_, _, place) in zip(places, batches, strict=True)]


def _gathered(answer: Tensor, ranges: list[tuple[int, int]], place: Tensor | None) -> Tensor:
    if len(ranges) > 1:
        return torch.cat([answer[start:end] for start, end in ranges], out=place)
    start, end = ranges[0]
    return answer[start:end].contiguous() if place is None else place.copy_(answer[start:end])
