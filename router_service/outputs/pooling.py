"""Pools the last hidden states of a prompt into one vector, chunk by chunk. Knows rows; knows no scheduling.

Sums are in fp32 whatever the model runs in. The vector has its own length; who asks may scale it.

Shapes: P rows to pool, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from cluster.messages import Embedding
from experts_service.device import HostCopy
from router_service.scheduling.sequence import Sequence
from router_service.step_failures import not_finite


class Pooled(NamedTuple):
    """The rows of a prompt that are pooled so far."""

    end: int  # the position after the last
    total: torch.Tensor  # [D] their sum
    on_host: HostCopy | None  # of the sum, where they are all of the prompt


def rows_to_pool(sequence: Sequence, start: int, end: int) -> range:
    """Positions among those from `start` to `end` whose hidden states are part of the vector."""
    if sequence.request.pooling is None:
        return range(0)
    return range(start if sequence.request.pooling == "mean" else max(start, sequence.num_prompt_tokens - 1), end)


def pool_prompts(
    hidden: torch.Tensor,  # [P, D]
    parts: Iterable[tuple[Sequence, range]],  # whose rows they are, and at which positions
) -> None:
    """Add to each sequence's `pooled`; a prompt that is computed again starts anew, and no row counts twice."""
    first = 0
    for sequence, positions in parts:
        rows = hidden[first : first + len(positions)].float()
        first += len(positions)
        if sequence.pooled is None or positions.start == 0:
            end, total = positions.stop, rows.sum(dim=0)
        else:  # a step that failed later on has pooled some of these rows, in whatever chunk
            end, total, _ = sequence.pooled
            new = rows[max(0, end - positions.start) :]
            end, total = max(end, positions.stop), total + new.sum(dim=0)
        is_whole = positions.stop == sequence.num_prompt_tokens
        sequence.pooled = Pooled(end, total, HostCopy(total) if is_whole else None)


def embedding(sequence: Sequence) -> Embedding:
    """The vector of a prompt whose last chunk is pooled. Raises Unavailable when it is not finite."""
    num_rows = sequence.num_prompt_tokens if sequence.request.pooling == "mean" else 1
    vector: torch.Tensor = sequence.pooled.on_host.wait() / num_rows
    if not math.isfinite(vector.sum()):
        raise not_finite()
    return Embedding(sequence.request.request_id, sequence.request.choice_index, vector.numpy().tobytes())
