"""One call of the maths for the rows of several frames. Knows tensors and counts; knows no socket and no frame.

frame a: counts (2, 1)   a0 a1 | a2            merged: counts (3, 3)   a0 a1 b0 | a2 b1 b2
frame b: counts (1, 2)   b0    | b1 b2         all rows of one expert stand together, as in one frame
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from experts_service.device import on_host, pinned, wait_for_queue
from experts_service.kernels.swiglu import Prepared

# layer, rows [R, D], counts [E], where the answers may be written → answers [R, D], there or in memory of their own
Maths = Callable[[int, Tensor, Sequence[int], Tensor | None], Tensor]
# layer, rows [R, D], counts [E], where the answers are to be written; None: that takes Python
Prepare = Callable[[int, Tensor, Sequence[int], Tensor], Prepared | None]
Batch = tuple[Tensor, tuple[int, ...], Tensor | None]  # rows [R, D] by expert, counts [E], where the answers belong


def run_as_one(
    maths: Maths, layer: int, batches: Sequence[Batch], *, for_gpu: bool = False
) -> list[Tensor]:  # each [R, D], contiguous
    """The answers to each of `batches`, worked out in one call: where they belong, or in new memory if that is nowhere.

    `for_gpu`: rows are merged in memory that a GPU copies from by itself; where some are on it, there.
    """
    if len(batches) == 1:
        rows, counts, place = batches[0]
        answer = maths(layer, rows, counts, place)
        if answer is place:
            return [answer]
        return [answer.contiguous() if place is None else place.copy_(answer)]
    counts_of = np.array([counts for _, counts, _ in batches])  # [B, E]
    of_all = counts_of.sum(0)  # [E]
    first = of_all.cumsum() - of_all + counts_of.cumsum(0) - counts_of  # [B, E]; of each batch's expert, in merged rows
    shift = first - (counts_of.cumsum(1) - counts_of)  # [B, E]; from where they are in the batch
    places = [  # of each batch's rows in the merged ones
        torch.from_numpy(by.repeat(counts) + np.arange(len(rows)))
        for (rows, _, _), counts, by in zip(batches, counts_of, shift, strict=True)
    ]
    some = batches[0][0]
    size = (int(of_all.sum()), some.shape[1])
    device = next((rows.device for rows, _, _ in batches if not rows.is_cpu), None)
    if device is not None:
        return _run_there(device, maths, layer, batches, tuple(of_all.tolist()), places)
    merged = pinned(size, some.dtype) if for_gpu else some.new_empty(size)
    for of_batch, (rows, _, _) in zip(places, batches, strict=True):
        merged.index_copy_(0, of_batch, rows)
    answer = maths(layer, merged, tuple(of_all.tolist()), None)  # [R of all, D]
    return [
        torch.index_select(answer, 0, of_batch, out=place)
        for of_batch, (_, _, place) in zip(places, batches, strict=True)
    ]


def _run_there(
    device: torch.device,
    maths: Maths,
    layer: int,
    batches: Sequence[Batch],
    counts: tuple[int, ...],
    places: Sequence[Tensor],
) -> list[Tensor]:
    """The same where rows of some are on a device already: those of the others are copied there."""
    some = batches[0][0]
    merged = torch.empty(sum(counts), some.shape[1], dtype=some.dtype, device=device)
    places = [of_batch.to(device) for of_batch in places]
    for of_batch, (rows, _, _) in zip(places, batches, strict=True):
        merged.index_copy_(0, of_batch, rows.to(device, non_blocking=True))
    answer = maths(layer, merged, counts, torch.empty_like(merged))  # [R of all, D]
    answers = []
    for of_batch, (_, _, place) in zip(places, batches, strict=True):
        of_one = answer.index_select(0, of_batch)
        answers.append(on_host(of_one) if place is None else place.copy_(of_one))
    wait_for_queue(device)
    return answers
