"""Log-probabilities of chosen and of prompt tokens, from raw logits. Knows rows and positions; knows no scheduling.

The logits of position p score the token at p + 1, so a chunk of a prompt scores all its tokens but the first, and the
first of the next chunk; the first token of a prompt has no score.

Shapes: P rows to score, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch

from cluster.messages import TokenLogprobs
from cluster.planning.step_memory import SCORED_ROWS
from experts_service.device import HostCopy, upload
from router_service.outputs.top import top
from router_service.scheduling.sequence import Sequence


def token_logprobs(logits: torch.Tensor, token_ids: Seq[int], counts: Seq[int]) -> list[TokenLogprobs]:
    """For each row of `logits` [P, V] the log-probability of its token, and those of its `counts` most likely ones."""
    return _Launched(logits, token_ids, counts).wait()


class _Launched:
    """They are on their way to the host.

    On a CPU they are there, and read at once: small tensors that stay between large ones keep malloc from using the
    memory of those again.
    """

    def __init__(self, logits: torch.Tensor, token_ids: Seq[int], counts: Seq[int]) -> None:
        logprobs = logits.log_softmax(dim=-1)
        [chosen] = upload([np.array(token_ids, np.int64)], logits.device)
        largest, columns = top(logprobs, max(counts))
        of_tokens = logprobs.gather(1, chosen[:, None])  # [P, 1]
        self._counts = counts
        self._copies = [HostCopy(tensor) for tensor in (of_tokens, columns, largest)]  # the last two [P, K]
        self._scores: list[TokenLogprobs] | None = None
        if logits.is_cpu:
            self._scores = self._read()

    def wait(self) -> list[TokenLogprobs]:
        """Once they are there. Raises what the device raised meanwhile."""
        return self._read() if self._scores is None else self._scores

    def _read(self) -> list[TokenLogprobs]:
        arrived = [copy.wait().tolist() for copy in self._copies]
        self._copies.clear()
        return [
            TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for [logprob], ids, values, count in zip(*arrived, self._counts, strict=True)
        ]


def rows_to_score(sequence: Sequence, start: int, end: int) -> range:
    """Positions among those from `start` to `end` whose logits score a prompt token that has no score yet."""
    if sequence.prompt_logprobs is None:
        return range(0)
    return range(max(start, len(sequence.prompt_logprobs) - 1), min(end, sequence.num_prompt_tokens - 1))


def score_prompts(
    hidden: torch.Tensor,  # [P, D]
    rows: Iterable[tuple[Sequence, int]],  # whose row it is, and its position
    to_logits: Callable[[torch.Tensor], torch.Tensor],  # [P, D] → [P, V]
) -> Callable[[], list[Sequence]]:
    """Launch the scoring, a slice of rows at a time. What is returned waits for it and books it, called once:

    it appends to each sequence's `prompt_logprobs`, and returns those with one not finite.
    """
    all_rows = list(rows)
    parts = []
    for at in range(0, len(all_rows), SCORED_ROWS):
        part = all_rows[at : at + SCORED_ROWS]
        token_ids = [sequence.token_ids[position + 1] for sequence, position in part]
        counts = [sequence.request.sampling.prompt_logprobs or 0 for sequence, _ in part]
        parts.append((part, _Launched(to_logits(hidden[at : at + SCORED_ROWS]), token_ids, counts)))
    return lambda: _book(parts)


def _book(parts: list[tuple[list[tuple[Sequence, int]], _Launched]]) -> list[Sequence]:
    not_finite: dict[Sequence, None] = {}
    for part, launched in parts:
        for (sequence, position), score in zip(part, launched.wait(), strict=True):
            assert sequence.prompt_logprobs is not None, "only rows that were asked for are scored"
            assert len(sequence.prompt_logprobs) == position + 1, "scores come in order"
            sequence.prompt_logprobs.append(score)
            if not math.isfinite(score.token_logprob):
                not_finite[sequence] = None
    return list(not_finite)
