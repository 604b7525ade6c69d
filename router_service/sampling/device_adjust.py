"""What sequences wish of their logits, as torch's operations. Knows no parameters; never waits for the device.

The same as `compiled_adjust.py`, on a GPU, and on a CPU without numba. A row's wishes go there as the few places that
they change, all rows' in one copy.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from experts_service.device import upload
from router_service.sampling.compiled_adjust import Wishes

_Floats = NDArray[np.float32]
_Places = NDArray[np.int64]


def adjust(logits: torch.Tensor, wishes: Seq[tuple[int, Wishes]]) -> None:
    """Change contiguous `logits` [B, V] in place by what some rows wish, and nothing where nobody wishes it."""
    vocabulary, flat = logits.shape[1], logits.view(-1)

    def of_all(changes: Callable[[Wishes], tuple[_Places, _Floats]]) -> tuple[_Places, _Floats]:
        of_rows = [(row * vocabulary, *changes(of_row)) for row, of_row in wishes]
        places = np.concatenate([start + ids for start, ids, _ in of_rows])
        return places, np.concatenate([values for _, _, values in of_rows])

    masks = [(row, of_row.mask) for row, of_row in wishes if of_row.mask is not None]
    seen, divisors, charged, penalties, biased, bias, rows, bits = upload(
        [
            *of_all(_divisors),
            *of_all(_penalties),
            *of_all(_bias),
            np.array([row for row, _ in masks], np.int64),
            np.stack([mask for _, mask in masks]) if masks else np.empty((0, 0), np.uint8),
        ],
        logits.device,
    )
    if len(seen):
        # Positive ones are divided, negative ones multiplied: the lower result, or, of a reward, the higher one.
        scores = flat.index_select(0, seen)
        multiplied, divided = scores * divisors, scores / divisors
        penalised = torch.where(divisors < 1.0, torch.maximum(multiplied, divided), torch.minimum(multiplied, divided))
        flat.index_copy_(0, seen, penalised)
    if len(charged):
        flat.index_add_(0, charged, penalties, alpha=-1)
    if len(biased):
        flat.index_add_(0, biased, bias)
    if masks:
        may_come = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1  # [M, V / 8, 8]
        may_come = may_come.flatten(1)[:, :vocabulary].bool()
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~may_come, float("-inf")))


def _divisors(of_row: Wishes) -> tuple[_Places, _Floats]:
    return _where(of_row.divisors, 1.0)


def _penalties(of_row: Wishes) -> tuple[_Places, _Floats]:
    return _where(of_row.penalties, 0.0)


def _bias(of_row: Wishes) -> tuple[_Places, _Floats]:
    if of_row.bias_ids is None or of_row.bias is None:
        return _where(None, 0.0)
    return of_row.bias_ids, of_row.bias


def _where(values: _Floats | None, nothing: float) -> tuple[_Places, _Floats]:
    """Those that change something, and their token ids."""
    if values is None:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    ids = np.flatnonzero(values != nothing)
    return ids, values[ids]
