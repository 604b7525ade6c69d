"""Which experts the rows that tokens are sampled from went to, for requests that ask. Knows rows; knows no gate.

A token's experts are those of the row it was sampled from, the last row of its step: that row was computed for it, and
every token has one, the last included, which is never run itself.

Shapes: L layers, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch

from experts_service.device import HostCopy, upload
from router_service.scheduling.scheduler import Batch
from router_service.scheduling.sequence import Sequence


class RoutedExperts:
    """The rows of one microbatch to remember; falsy when nobody asks, which costs one look at each sequence."""

    def __init__(self, batch: Batch) -> None:
        self.layers: list[torch.Tensor] = []  # the decoder appends each layer's choice [T, K]
        self._sequences: list[Sequence] = []
        self._rows: list[int] = []
        self._copy: HostCopy | None = None
        last_row = -1
        for scheduled in batch:
            last_row += scheduled.num_tokens
            if scheduled.samples and scheduled.sequence.request.sampling.routed_experts:
                self._sequences.append(scheduled.sequence)
                self._rows.append(last_row)

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def launch(self) -> None:
        """All layers have run: one copy from the device begins."""
        if self.layers and self._rows:
            [rows] = upload([np.array(self._rows)], self.layers[0].device)
            chosen = torch.stack([experts.index_select(0, rows) for experts in self.layers], dim=1)  # [B, L, K]
            self._copy = HostCopy(chosen.to(torch.int16))

    def tell(self) -> None:
        """Give each sequence that asked its `routed_experts`, uint16 [L, K] as bytes; of a dense model there are none.

        Waits for the copy.
        """
        chosen = [b""] * len(self._rows) if self._copy is None else self._copy.wait().numpy()
        for sequence, experts in zip(self._sequences, chosen, strict=True):
            sequence.routed_experts = bytes(experts)
