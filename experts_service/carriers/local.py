"""Transport `local`: the groups' experts live in the coordinator's own process. For one-GPU machines and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experts_service.kernels.crew import Crew, Job, run_in_turn
from experts_service.kernels.experts import Experts
from experts_service.transport import Flight, GroupRows


class _Landed:
    def wait(self) -> None:
        """Nothing to wait for: the answers were written by `send`."""

    def close(self) -> None:
        """Nothing is under way."""


class LocalTransport:
    """Runs the experts where it is called; in bf16 side by side.

    In fp32 they take turns on all threads, as the reference does: fp32 is rounded otherwise on another number of them.
    """

    def __init__(self, groups: Mapping[int, Experts]) -> None:
        self._groups = dict(groups)
        self._crew = Crew()

    @torch.inference_mode()
    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        jobs: list[Job] = []
        for part in parts:
            indices = torch.from_numpy(part.row_indices).to(rows.device)  # [R]
            own_rows = rows.index_select(0, indices)  # [R, D]
            jobs += self._groups[part.group].jobs(layer, own_rows, part.counts, part.answer)
        if rows.dtype is torch.bfloat16:
            self._crew.run(jobs)
        else:
            run_in_turn(jobs)
        return _Landed()

    def close(self) -> None:
        self._crew.close()
        self._groups.clear()
