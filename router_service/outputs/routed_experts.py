"""Which experts the rows that tokens are sampled from went to, for requests that ask. Knows rows; knows no gate.

A token's experts are those of the row it was sampled from, the last row of its step: that row was computed for it, and
every token has one, the last included, which is never run itself.

Shapes: L layers, K experts per token.
"""

from __future__ import annotations

import torch

from router_service.scheduling.scheduler import Batch
from router_service.scheduling.sequence import Sequence


class RoutedExperts:
    """The rows of one microbatch to remember; falsy when nobody asks, which costs one look at each sequence."""

    def __init__(self, batch: Batch) -> None:
        self.layers: list[torch.Tensor] = []  # the decoder appends each layer's choice [T, K]
        self._sequences: list[Sequence] = []
        self._rows: list[int] = []
        last_row = -1
        for scheduled in batch:
            last_row += scheduled.num_tokens
            if scheduled.samples and scheduled.sequence.request.sampling.routed_experts:
                self._sequences.append(scheduled.sequence)
                self._rows.append(last_row)

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def tell(self) -> None:
        """Give each sequence that asked its `routed_experts`, uint8 [L, K] as bytes: one copy from the device."""
        if not self.layers:  # a dense model
            for sequence in self._sequences:
                sequence.routed_experts = b""
            return
        rows = torch.tensor(self._rows, device=self.layers[0].device)
        chosen = torch.stack([experts.index_select(0, rows) for experts in self.layers], dim=1)  # [B, L, K]
        for sequence, experts in zip(self._sequences, chosen.to(torch.uint8).cpu().numpy(), strict=True):
            sequence.routed_experts = experts.tobytes()
