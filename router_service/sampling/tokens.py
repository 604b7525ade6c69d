"""What a step has sampled: on the device at once, for the next step; on the host when that asks. Knows no parameters.

Shapes: B rows, A of them with log-probabilities, K most likely tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.messages import TokenLogprobs
from experts_service.device import HostCopy, upload
from router_service.outputs.top import top

NOT_FINITE = -1
NOT_READY = -2


class Sampled(NamedTuple):
    """As the host has it, one of each for a row."""

    token_ids: list[int]  # or NOT_FINITE, NOT_READY
    logprobs: list[TokenLogprobs | None]


class Tokens(Protocol):
    """Of all rows of a step."""

    @property
    def on_device(self) -> torch.Tensor:
        """Token ids [B] to go on with; any, where there is none."""

    def wait(self) -> Sampled:
        """Raises what the device raised meanwhile."""


class HostTokens:
    """Chosen on the host already."""

    def __init__(self, token_ids: list[int], logprobs: list[TokenLogprobs | None]) -> None:
        self._sampled = Sampled(token_ids, logprobs)

    @property
    def on_device(self) -> torch.Tensor:
        """Token ids [B] to go on with."""
        return torch.tensor(self._sampled.token_ids, dtype=torch.int64).clamp_(min=0)

    def wait(self) -> Sampled:
        """At once."""
        return self._sampled


class DeviceTokens:
    """Chosen on a GPU. All that the host is told goes there in one copy, as 32-bit words.

    ids [B] │ log-probabilities of the chosen [A] │ most likely ids [A, K] │ their log-probabilities [A, K]
    """

    def __init__(
        self,
        logits: torch.Tensor,  # [B, V] fp32, raw
        chosen: torch.Tensor,  # [B]
        counts: Seq[int | None],  # most likely tokens that each row asks for; None: no log-probabilities at all
        not_ready: Collection[int],  # rows
    ) -> None:
        token_ids = torch.where(logits.sum(dim=-1).isfinite(), chosen, NOT_FINITE)
        self.on_device = token_ids.clamp(min=0)
        self._counts, self._not_ready = counts, not_ready
        words = [token_ids.int()]
        self._asking = [row for row, count in enumerate(counts) if count is not None]
        if self._asking:
            [rows] = upload([np.array(self._asking)], logits.device)
            logprobs = logits.index_select(0, rows).log_softmax(dim=-1)  # [A, V]
            of_chosen = logprobs.gather(1, chosen.index_select(0, rows)[:, None])
            largest, columns = top(logprobs, max(count for count in counts if count is not None))
            words += [of_chosen.view(torch.int32), columns.int(), largest.contiguous().view(torch.int32)]
        self._copy = HostCopy(torch.cat([part.flatten() for part in words]))

    def wait(self) -> Sampled:
        """Once they have arrived."""
        words: NDArray[np.int32] = self._copy.wait().numpy()
        token_ids: list[int] = words[: len(self._counts)].tolist()
        for row in self._not_ready:
            token_ids[row] = NOT_READY
        logprobs: list[TokenLogprobs | None] = [None] * len(self._counts)
        if num_asking := len(self._asking):
            rest = words[len(self._counts) :]
            of_chosen = rest[:num_asking].view(np.float32).tolist()
            columns, largest = rest[num_asking:].reshape(2, num_asking, -1)
            tops = zip(columns.tolist(), largest.view(np.float32).tolist(), strict=True)
            for row, logprob, (ids, values) in zip(self._asking, of_chosen, tops, strict=True):
                count = self._counts[row]
                logprobs[row] = TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        return Sampled(token_ids, logprobs)
