"""Which answer is whose, worked out where the rows are: nothing waits for a device. Knows no transport and no layer.

The order is the dispatcher's, to the bit: rows by expert as the groups have them, then by choice, then by row. Answers
are added up by ascending expert, each term and each sum rounded.

Shapes: T tokens, K experts per token, E experts, D hidden size. A pair is choice · T + row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from router_service.rows import is_launched


class Routing(NamedTuple):
    """Where each row of one layer goes, and where its answers stand."""

    experts: Tensor  # [T, K]
    row_indices: Tensor  # [K * T] whose row it is, expert after expert
    ends: Tensor  # [E] int32, where the rows of each expert end
    places: Tensor  # [K * T] of each pair's answer


def route(experts: Tensor, ranks: Tensor, ends_so_far: Tensor, num_real: Tensor | None = None) -> Routing:
    """Of `experts` [T, K], which stand in the order of their `ranks` [E]. `ends` are added to `ends_so_far` [E].

    Rows from `num_real` [1] on, if given, go nowhere: their pairs stand behind all ends, and nobody answers them.
    """
    if is_launched(experts):
        from router_service import gpu_rows

        return Routing(experts, *gpu_rows.route(experts, ranks, ends_so_far, num_real))
    num_rows = len(experts)
    of_pairs = ranks.take(experts.t())  # [K, T]
    if num_real is not None:
        of_pairs = of_pairs.where(torch.arange(num_rows, device=ranks.device) < num_real, len(ranks))
    sorted_ranks, order = of_pairs.flatten().sort(stable=True)  # [K * T], [K * T]
    everyone = torch.arange(len(ranks), device=ranks.device)
    ends = torch.searchsorted(sorted_ranks, everyone, right=True, out_int32=True)
    ends_so_far += ends
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Routing(experts, order % max(1, num_rows), ends, places)


def combine(answers: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """The sum [T, D] of each row's `answers` [K * T, D], times their `weights` [T, K]."""
    if is_launched(answers):
        from router_service import gpu_rows

        return gpu_rows.combine(answers, weights, routing.experts, routing.places, len(routing.ends))
    by_expert = routing.experts.argsort(dim=1)  # [T, K]
    weights = weights.gather(1, by_expert).t().unsqueeze(2)  # [K, T, 1]
    places = routing.places.view(by_expert.t().shape).gather(0, by_expert.t())  # [K, T]
    total = answers  # [T, D] from the first choice on
    for choice, places_of_choice in enumerate(places.unbind()):
        term = (answers.index_select(0, places_of_choice) * weights[choice]).to(answers.dtype)  # [T, D]
        total = total.add_(term) if choice else term
    return total
