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

import torch
from torch import Tensor

from cluster.placement import ExpertGroup
from experts_service.transport import Flight, GroupRows, Transport

# T tokens, K experts per token, D hidden size, E experts


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Rows of one layer under way."""

    layer: int
    experts: Tensor  # [T, K]
    order: Tensor  # [K * T]; answers[i] belongs to pair order[i], which is choice * T + row
    answers: Tensor  # [K * T, D], written when flight.wait() returns
    flight: Flight


class Dispatcher:
    """The coordinator's way to its experts. One thread uses it, the engine's."""

    def __init__(self, groups: Sequence[ExpertGroup], transport: Transport) -> None:
        self._groups = tuple(groups)
        self._transport = transport
        self._order = [expert for group in self._groups for expert in group.experts]
        rank = torch.empty(len(self._order), dtype=torch.int64)
        rank[torch.tensor(self._order)] = torch.arange(len(self._order))
        self._rank = rank  # [E]; place of each expert when groups stand in a row
        self._rows_per_expert = [0] * len(self._order)

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows sent to each expert since the start, summed over layers."""
        return tuple(self._rows_per_expert)

    @torch.inference_mode()
    def dispatch(self, layer: int, rows: Tensor, experts: Tensor) -> Dispatch:
        """Send `rows` [T, D] to `experts` [T, K], distinct within a row. Does not wait."""
        num_experts, num_rows = len(self._order), len(rows)
        if self._rank.device != experts.device:
            self._rank = self._rank.to(experts.device)
        ranks = self._rank[experts.t()].flatten()  # [K * T]
        order = ranks.argsort(stable=True)  # [K * T]; by group, expert, choice, row, as the reference orders them
        row_indices = order % num_rows if num_rows else order  # [K * T]
        counts = ranks.bincount(minlength=num_experts).tolist()  # [E]; on a GPU the one host sync of the layer
        answers = rows.new_empty(len(order), rows.shape[-1])  # [K * T, D]
        parts = []
        start = first = 0
        for group in self._groups:
            of_group = tuple(counts[first : first + len(group.experts)])
            first += len(group.experts)
            end = start + sum(of_group)
            if end > start:
                parts.append(GroupRows(group.index, row_indices[start:end], of_group, answers[start:end]))
            start = end
        flight = self._transport.send(layer, rows, parts)
        for expert, count in zip(self._order, counts, strict=True):
            self._rows_per_expert[expert] += count
        return Dispatch(layer, experts, order, answers, flight)

    @torch.inference_mode()
    def combine(self, dispatch: Dispatch, weights: Tensor) -> Tensor:
        """Wait for the answers, weigh them by `weights` [T, K] and add them up: [T, D]. Raises ExpertUnavailable."""
        num_rows, top_k = dispatch.experts.shape
        ascending = dispatch.experts.argsort(dim=-1)  # [T, K]
        place = torch.empty_like(dispatch.order)
        place[dispatch.order] = torch.arange(len(place), device=place.device)  # pair → answer
        place = place.view(top_k, num_rows).t().gather(1, ascending)  # [T, K]
        weights = weights.gather(1, ascending).unsqueeze(-1)  # [T, K, 1]
        dispatch.flight.wait()
        answers = dispatch.answers
        total = torch.zeros(num_rows, answers.shape[-1], dtype=answers.dtype, device=answers.device)  # [T, D]
        for k in range(top_k):
            total += (answers[place[:, k]] * weights[:, k]).to(answers.dtype)
        return total

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
