"""Transport `local`: the groups' experts live in the coordinator's own process. For one-GPU machines and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experts_service.kernels.experts import Experts
from experts_service.transport import Flight, GroupRows


class _Answered:
    def wait(self) -> None:
        """Nothing to wait for: the answers were written by `send`."""

    def close(self) -> None:
        """Nothing is under way."""


class LocalTransport:
    """Runs the experts where it is called."""

    def __init__(self, groups: Mapping[int, Experts]) -> None:
        self._groups = dict(groups)

    @torch.inference_mode()
    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        for part in parts:
            indices = torch.from_numpy(part.row_indices).to(rows.device)  # [R]
            own_rows = rows.index_select(0, indices)  # [R, D]
            self._groups[part.group](layer, own_rows, part.counts, part.answer)
        return _Answered()

    def close(self) -> None:
        self._groups.clear()
