"""Transport `local`: the groups' experts live in the coordinator's own process. For one-GPU machines and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experts_service.device import upload
from experts_service.kernels.swiglu import Chained
from experts_service.loaded_experts import LoadedExperts
from experts_service.transport import Flight, GroupRows


class _Answered:
    def wait(self) -> None:
        """Nothing to wait for: the answers were written by `send`."""

    def close(self) -> None:
        """Nothing is under way."""


ANSWERED = _Answered()


class LocalTransport:
    """Runs the experts where it is called."""

    takes_device_rows = True

    def __init__(self, groups: Mapping[int, LoadedExperts]) -> None:
        self._groups = dict(groups)

    @torch.inference_mode()
    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        for part in parts:
            [indices] = upload([part.row_indices], rows.device)  # [R]
            own_rows = rows.index_select(0, indices)  # [R, D]
            self._groups[part.group](layer, own_rows, part.counts, part.answer)
        return ANSWERED

    @property
    def grouped(self) -> LoadedExperts | None:
        """All experts as one group that nobody has to tell counts on the host, if they are that."""
        experts = next(iter(self._groups.values())) if len(self._groups) == 1 else None
        return experts if experts is not None and experts.takes_ends else None

    def chained(self, layer: int) -> Chained | None:
        """How a chain runs all experts of a layer, in their order, if one can."""
        of_groups = [(experts.experts, experts.chained(layer)) for experts in self._groups.values()]
        first = of_groups[0][1] if of_groups else None
        if first is None or any(one is None or not one.is_like(first) for _, one in of_groups):
            return None
        order = torch.tensor([expert for experts, _ in of_groups for expert in experts]).argsort()
        tables = [torch.cat(parts)[order] for parts in zip(*(one.tables for _, one in of_groups if one), strict=True)]
        weights = tuple(one.weights for _, one in of_groups if one)
        return replace(first, tables=tuple(tables), weights=weights)

    def close(self) -> None:
        self._groups.clear()
