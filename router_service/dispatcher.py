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
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import ANSWERED, LocalTransport
from experts_service.device import HostCopy, on_host, pinned, upload, wait_for_queue
from experts_service.kernels.compiled.route import RouteElsewhere
from experts_service.kernels.swiglu import Chained
from experts_service.loaded_experts import LoadedExperts
from experts_service.transport import Flight, GroupRows, InPlaceFlight, Transport
from router_service import routing
from router_service.routing import Routing
from router_service.rows import Combining, is_compiled

Indices = npt.NDArray[np.int64]

MOST_ROW_PLANS = 1024

# T tokens, K experts per token, D hidden size, E experts


class Exchange(NamedTuple):
    """Memory that captured steps share, all their layers: what they leave on the host, and where answers are copied.

    One layer after the other uses it. The device reads answers before it is told of the next ones, and the host has
    heard all answers before the device overwrites what was sent.
    """

    rows: Tensor  # [B, D] on the host
    rows_on_device: Tensor  # the same, for a transport that takes those
    experts: Tensor  # [B, K] on the host
    answers: Tensor  # [K * B, D] on the device


@dataclass(slots=True)
class Dispatch:
    """Rows of one layer under way."""

    layer: int
    num_rows: int
    # Of a CPU, without gaps; on a GPU there is `routing` in their place.
    take: Tensor | None  # [K, T], or [K] for one row: where its answers are, experts ascending; None: as they stand
    pairs: Tensor | None  # the same shape; where their weights are, choice * T + row; None: as they stand
    answers: Tensor  # [K * T, D], written when flight.wait() returns
    flight: Flight
    routing: Routing | None = None
    exchange: Exchange | None = None  # nothing has been sent yet: `Dispatcher.exchange` does

    def close(self) -> None:
        """Nobody waits for what has not come. On the thread that sent it, before it is dropped."""
        self.flight.close()


class _RowPlan(NamedTuple):
    """What follows from the experts of one row, whatever its numbers."""

    parts: tuple[tuple[int, Indices, tuple[int, ...], int], ...]  # group, row indices, counts, start of its answers
    take: Tensor | None  # as in `Dispatch`
    pairs: Tensor | None


class Dispatcher:
    """The coordinator's way to its experts. One thread uses it, the engine's, in inference mode.

    Indices are worked out in numpy: for a few rows it takes a third of the time of the same tensor operations. One row,
    a decode step of one sequence, needs no arrays: it is worked out in plain Python, in a third of that again.

    On a GPU, rows and experts are copied to the host together and waited for once, and what is done with the answers is
    worked out there meanwhile. Where the experts are here and are told by tensors, the host has no part in it.
    """

    def __init__(self, groups: Sequence[ExpertGroup], transport: Transport) -> None:
        self._groups = tuple(groups)
        self._transport = transport
        self._order = np.array([expert for group in self._groups for expert in group.experts], dtype=np.int64)  # [E]
        self._rank = self._order.argsort()  # [E]; place of each expert when groups stand in a row
        self._ranks: list[int] = self._rank.tolist()
        self._group_of = [
            (group, int(self._rank[group.experts[0]])) for group in self._groups for _ in group.experts
        ]  # [E]; by rank: the group, and its first rank
        self._rows_per_expert = [0] * len(self._order)  # of batches of one row
        self._rows_by_rank = np.zeros(len(self._order), dtype=np.int64)  # of all others
        self._here = transport if isinstance(transport, LocalTransport) else None
        self._first_row = np.zeros(len(self._order), dtype=np.int64)  # the row indices of a batch of one row
        self._row_plans: dict[tuple[int, ...], _RowPlan] = {}  # by the experts of one row, in the gate's order
        self._grouped = None if self._here is None else self._here.grouped
        self._exchange: Exchange | None = None
        self._on_device: tuple[Tensor, Tensor] | None = None  # ranks [E]; ends [E] of all dispatches, summed, by rank
        if self._grouped is not None:
            self._ends = on_host(self._of_device(self._grouped.device)[1])  # as they were a step ago

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows sent to each expert since the start, summed over layers. From any thread; on a GPU a step late."""
        if self._grouped is None:
            return tuple((self._rows_by_rank[self._rank] + self._rows_per_expert).tolist())
        seen, last = np.empty(0), np.empty(0)
        while not len(seen) or not np.array_equal(seen, last):  # the device may be writing the next step's
            seen, last = self._ends.numpy().copy(), seen
        counts = np.diff(seen, prepend=0)
        return tuple(counts[self._rank].tolist())

    @property
    def waits_for_nobody(self) -> bool:
        """Whether a layer is launched whole: nobody on the host has to know who goes where, or to hear of an answer."""
        return not self._groups or self._grouped is not None

    @property
    def can_be_captured(self) -> bool:
        """Whether a layer up to where something is sent, and from its answers on, is launches and nothing else."""
        return self.waits_for_nobody or self._here is None

    def end_step(self) -> None:
        """All layers have been dispatched: what was counted on a device is copied to the host, and not waited for."""
        if self._grouped is not None:
            self._ends.copy_(self._of_device(self._grouped.device)[1], non_blocking=True)

    def chained(self, layer: int) -> Chained | None:
        """How the coordinator runs the experts of a layer itself, without dispatching, if it can."""
        return None if self._here is None else self._here.chained(layer)

    def count(self, rows: Tensor) -> None:
        """Of the experts that it ran itself in a step, of each layer: `rows` [L, E]."""
        self._rows_by_rank[self._rank] += rows.sum(0).numpy()

    def route(self, num_rows: int, top_k: int, hidden: int) -> RouteElsewhere | None:
        """What sorts so many rows in a chain, for `dispatch_routed`. None: one row, which is done in plain Python."""
        if num_rows == 1:
            return None
        return RouteElsewhere(num_rows, top_k, hidden, torch.from_numpy(self._rank))

    def dispatch_routed(self, layer: int, rows: Tensor, route: RouteElsewhere) -> Dispatch:
        """As `dispatch`, of rows that `route` has sorted, and into its memory: one at a time."""
        counts = route.counts.numpy()
        parts = self._parts(counts, route.indices.numpy(), route.answers)
        flight = self._transport.send(layer, rows, parts)
        self._rows_by_rank += counts
        return Dispatch(layer, len(rows), route.places, route.pairs, route.answers, flight)

    def dispatch(self, layer: int, rows: Tensor, experts: Tensor, num_real: Tensor | None = None) -> Dispatch:
        """Send `rows` [T, D] to `experts` [T, K], distinct within a row. Does not wait for them.

        Rows from `num_real` [1] on, of which only the device knows, are padding: no expert computes or counts them, and
        their answers are anything. It is given where a step is captured: then nothing is sent to experts elsewhere, but
        left for `exchange`. Only where it `can_be_captured`.
        """
        if self._grouped is not None:
            return self._dispatch_here(self._grouped, layer, rows, experts, num_real)
        if num_real is not None:
            return self._leave(layer, rows, experts, num_real)
        answers = rows.new_empty(experts.numel(), rows.shape[-1])  # [K * T, D]
        if experts.is_cpu:
            return self._dispatch_on_host(layer, rows, experts, answers)
        of_rows = None if self._transport.takes_device_rows else HostCopy(rows)
        of_experts = HostCopy(experts)
        routed = routing.route(experts, *self._of_device(experts.device))
        experts = of_experts.wait()
        if of_rows is not None:
            rows = of_rows.wait()  # they came before
        dispatch = self._dispatch_on_host(layer, rows, experts, answers)
        dispatch.routing = routed
        return dispatch

    def _dispatch_on_host(self, layer: int, rows: Tensor, experts: Tensor, answers: Tensor) -> Dispatch:
        """The same with `experts` on the host, and `answers` [K * T, D] to be written."""
        num_rows = experts.shape[0]
        if num_rows == 1:
            return self._dispatch_row(layer, rows, experts.tolist()[0], answers)
        chosen: Indices = experts.numpy()  # [T, K]
        ranks = self._rank[chosen.T].ravel()  # [K * T]
        order = ranks.argsort(kind="stable")  # [K * T]; by group, expert, choice, row, as the reference has them
        row_indices = order % num_rows if num_rows else order  # [K * T]
        by_rank = np.bincount(ranks, minlength=len(self._order))  # [E]
        self._rows_by_rank += by_rank
        parts = self._parts(by_rank, row_indices, answers)
        dispatch = Dispatch(layer, num_rows, None, None, answers, self._transport.send(layer, rows, parts))
        if not answers.is_cpu:
            return dispatch
        try:
            # The rest is worked out while the experts compute.
            place = np.empty_like(order)
            place[order] = np.arange(len(place))  # [K * T]; pair → answer, a pair being choice * T + row
            pairs = np.ascontiguousarray(chosen.argsort(axis=1).T) * num_rows + np.arange(num_rows)  # [K, T]; by expert
            dispatch.take, dispatch.pairs = torch.from_numpy(place[pairs]), torch.from_numpy(pairs)
        except BaseException:
            dispatch.close()
            raise
        return dispatch

    def _parts(self, rows_by_rank: Indices, row_indices: Indices, answers: Tensor) -> list[GroupRows]:
        """What each group is asked that has rows: `row_indices` [K * T] by rank, of which there are so many [E]."""
        counts = rows_by_rank.tolist()
        parts = []
        start = first = 0
        for group in self._groups:
            of_group = tuple(counts[first : first + len(group.experts)])
            first += len(group.experts)
            end = start + sum(of_group)
            if end > start:
                parts.append(GroupRows(group.index, row_indices[start:end], of_group, answers, start))
            start = end
        return parts

    def combine(self, dispatch: Dispatch, weights: Tensor) -> Tensor:
        """Wait for the answers, weigh them by `weights` [T, K] and add them up: [T, D]. Raises ExpertUnavailable."""
        if dispatch.routing is not None:
            dispatch.flight.wait()
            return routing.combine(dispatch.answers, weights, dispatch.routing)
        answers, take, pairs = dispatch.answers, dispatch.take, dispatch.pairs
        if is_compiled(answers, answers.shape[-1]):
            combining = Combining(weights.contiguous(), answers.new_empty(weights.shape[0], answers.shape[-1]))
            self.combine_into(combining, dispatch)
            return combining.totals
        weights = weights.t()  # [K, T]
        if dispatch.num_rows == 1:
            if pairs is not None:
                weights = weights.index_select(0, pairs)  # [K, 1]
            dispatch.flight.wait()
            if take is not None:
                answers = answers.index_select(0, take)  # [K, D]
            terms = (answers * weights).to(answers.dtype)  # [K, D]
            total = terms[:1]  # [1, D]
            for k in range(1, len(terms)):
                total = total + terms[k]
            return total
        assert take is not None
        assert pairs is not None
        weights = weights.flatten().take(pairs).unsqueeze(-1)  # [K, T, 1]
        dispatch.flight.wait()
        total = answers  # [T, D] from the first choice on
        for choice, rows_of_choice in enumerate(take):  # one at a time: large temporaries cost more than calls
            term = (answers.index_select(0, rows_of_choice) * weights[choice]).to(answers.dtype)  # [T, D]
            total = total.add_(term) if choice else term
        return total

    def combine_into(self, combining: Combining, dispatch: Dispatch) -> None:
        """The same, with weights and for totals of `combining`: of a dispatch whose answers are compiled code's."""
        take, pairs, flight = dispatch.take, dispatch.pairs, dispatch.flight
        if isinstance(flight, InPlaceFlight) and combining.run_in_place(flight.wait_in_place(), take, pairs):
            flight.release()
            return
        flight.wait()
        combining.run(dispatch.answers, take, pairs)

    def _dispatch_here(
        self, grouped: LoadedExperts, layer: int, rows: Tensor, experts: Tensor, num_real: Tensor | None
    ) -> Dispatch:
        """The same for experts that are here, without a look at any number."""
        routed = routing.route(experts, *self._of_device(experts.device), num_real)
        answers = rows.new_empty(experts.numel(), rows.shape[-1])  # [K * T, D]
        grouped.run(layer, rows.index_select(0, routed.row_indices), routed.ends, answers)
        return Dispatch(layer, len(rows), None, None, answers, ANSWERED, routed)

    def _leave(self, layer: int, rows: Tensor, experts: Tensor, num_real: Tensor) -> Dispatch:
        """What of a dispatch can be captured: where answers will stand, and copies of what is to be sent."""
        size, top_k = experts.shape
        kept = self._exchange
        if kept is None or len(kept.rows) < size:  # never while something is captured: it has been run before
            kept = self._exchange = _new_exchange(rows, experts)
        kept.rows[:size].copy_(rows, non_blocking=True)
        kept.rows_on_device[:size].copy_(rows)
        kept.experts[:size].copy_(experts, non_blocking=True)
        routed = routing.route(experts, *self._of_device(experts.device), num_real)
        return Dispatch(layer, size, None, None, kept.answers[: size * top_k], ANSWERED, routed, kept)

    def exchange(self, dispatch: Dispatch, num_rows: int) -> None:
        """Send the first `num_rows` of what a captured layer has left, and wait until their answers are copied.

        Raises ExpertUnavailable.
        """
        kept = dispatch.exchange
        assert kept is not None, "captured"
        wait_for_queue(kept.answers.device)
        experts = kept.experts[:num_rows]
        answers = kept.answers[: experts.numel()]
        rows = kept.rows_on_device if self._transport.takes_device_rows else kept.rows
        with closing(self._dispatch_on_host(dispatch.layer, rows[:num_rows], experts, answers)) as sent:
            sent.flight.wait()

    def _of_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What routing is told there, made once."""
        if self._on_device is None:
            [ranks] = upload([self._rank], device)
            self._on_device = ranks, torch.zeros_like(ranks)
        return self._on_device

    def _dispatch_row(self, layer: int, row: Tensor, experts: list[int], answers: Tensor) -> Dispatch:
        """The same for one row [1, D] and its `experts` [K]."""
        plan = self._row_plans.get(key := tuple(experts))
        if plan is None:
            plan = self._plan_row(key)
        parts = [GroupRows(group, indices, counts, answers, start) for group, indices, counts, start in plan.parts]
        flight = self._transport.send(layer, row, parts)
        for expert in experts:
            self._rows_per_expert[expert] += 1
        return Dispatch(layer, 1, plan.take, plan.pairs, answers, flight)

    def _plan_row(self, experts: tuple[int, ...]) -> _RowPlan:
        """There are few choices of so few experts, and they come again and again: what follows from one is kept."""
        ranked = sorted(self._ranks[expert] for expert in experts)  # the answers stand in this order
        parts = []
        start = 0
        while start < len(ranked):
            group, first = self._group_of[ranked[start]]
            counts = [0] * len(group.experts)
            end = start
            while end < len(ranked) and ranked[end] < first + len(counts):
                counts[ranked[end] - first] = 1
                end += 1
            parts.append((group.index, self._first_row[: end - start], tuple(counts), start))
            start = end
        ascending = sorted(experts)
        take = _permutation([ranked.index(self._ranks[expert]) for expert in ascending])
        pairs = _permutation([experts.index(expert) for expert in ascending])
        if len(self._row_plans) >= MOST_ROW_PLANS:
            self._row_plans.clear()
        plan = self._row_plans[experts] = _RowPlan(tuple(parts), take, pairs)
        return plan

    def apart(self, transport: Transport) -> Dispatcher:
        """One to the same experts, which counts for itself. Those that are not here are asked through `transport`."""
        return Dispatcher(self._groups, self._here or transport)

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()


def _new_exchange(rows: Tensor, experts: Tensor) -> Exchange:
    """For as many rows as these."""
    host = torch.empty if rows.is_cpu else pinned
    return Exchange(
        host(rows.shape, dtype=rows.dtype),
        torch.empty_like(rows),
        host(experts.shape, dtype=experts.dtype),
        rows.new_zeros(experts.numel(), rows.shape[-1]),
    )


def _permutation(indices: list[int]) -> Tensor | None:
    """As a tensor [K]; None when it changes nothing."""
    return None if indices == list(range(len(indices))) else torch.tensor(indices)
