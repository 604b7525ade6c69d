"""Sends each row to its experts and combines what they answer. Knows groups and gate weights; knows no transport.

    dispatch = dispatcher.dispatch(layer, x, experts)   # one message per chosen group, all sent before any is read
    ...                                                 # another microbatch may compute here
    y = dispatcher.combine(dispatch, weights)

The result is bitwise the same however experts are packed into groups: all rows of one expert are one matmul, every
(row, expert) pair comes back as a row of its own, and combine adds them in ascending expert order, as the reference's
`index_add_` over experts does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.placement import ExpertGroup
from experts_service.transport import Flight, GroupRows, Transport

Indices = npt.NDArray[np.int64]

# T tokens, K experts per token, D hidden size, E experts


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Rows of one layer under way."""

    layer: int
    experts: Indices  # [T, K]
    order: Indices  # [K * T]; answers[i] belongs to pair order[i], which is choice * T + row
    answers: Tensor  # [K * T, D], written when flight.wait() returns
    flight: Flight


class Dispatcher:
    """The coordinator's way to its experts. One thread uses it, the engine's.

    Indices are worked out in numpy: for a few rows it takes a third of the time of the same tensor operations, and on a
    GPU one copy of `experts` to the host is the only wait.
    """

    def __init__(self, groups: Sequence[ExpertGroup], transport: Transport) -> None:
        self._groups = tuple(groups)
        self._transport = transport
        self._order = np.array([expert for group in self._groups for expert in group.experts])  # [E]
        self._rank = self._order.argsort()  # [E]; place of each expert when groups stand in a row
        self._rows_per_expert = np.zeros(len(self._order), dtype=np.int64)  # [E]

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows sent to each expert since the start, summed over layers."""
        return tuple(self._rows_per_expert.tolist())

    @torch.inference_mode()
    def dispatch(self, layer: int, rows: Tensor, experts: Tensor) -> Dispatch:
        """Send `rows` [T, D] to `experts` [T, K], distinct within a row. Does not wait."""
        num_rows, top_k = experts.shape
        chosen: Indices = experts.cpu().numpy()  # [T, K]
        ranks = self._rank[chosen.T].ravel()  # [K * T]
        order = ranks.argsort(kind="stable")  # [K * T]; by group, expert, choice, row, as the reference has them
        row_indices = order % num_rows if num_rows else order  # [K * T]
        counts_by_rank = np.bincount(ranks, minlength=len(self._order))  # [E]
        self._rows_per_expert[self._order] += counts_by_rank
        counts = counts_by_rank.tolist()
        answers = rows.new_empty(num_rows * top_k, rows.shape[-1])  # [K * T, D]
        parts = []
        start = first = 0
        for group in self._groups:
            of_group = tuple(counts[first : first + len(group.experts)])
            first += len(group.experts)
            end = start + sum(of_group)
            if end > start:
                parts.append(GroupRows(group.index, row_indices[start:end], of_group, answers, start))
            start = end
        return Dispatch(layer, chosen, order, answers, self._transport.send(layer, rows, parts))

    @torch.inference_mode()
    def combine(self, dispatch: Dispatch, weights: Tensor) -> Tensor:
        """Wait for the answers, weigh them by `weights` [T, K] and add them up: [T, D]. Raises ExpertUnavailable."""
        answers = dispatch.answers
        num_rows, top_k = dispatch.experts.shape
        place = np.empty_like(dispatch.order)
        place[dispatch.order] = np.arange(len(place))  # [K * T]; pair → answer
        pairs = dispatch.experts.argsort(axis=1).T * num_rows + np.arange(num_rows)  # [K, T]; by ascending expert
        take = torch.from_numpy(place[pairs].ravel()).to(answers.device)  # [K * T]
        weights = weights.t().flatten()[torch.from_numpy(pairs).to(weights.device)].unsqueeze(-1)  # [K, T, 1]
        dispatch.flight.wait()
        terms = answers.index_select(0, take).view(top_k, num_rows, answers.shape[-1]) * weights  # [K, T, D]
        terms = terms.to(answers.dtype)
        total = terms[0]  # [T, D]
        for k in range(1, top_k):
            total = total + terms[k]
        return total

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
