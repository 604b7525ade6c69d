"""Log-probabilities of chosen and of prompt tokens, from raw logits. Knows rows and positions; knows no scheduling.

The logits of position p score the token at p + 1, so a chunk of a prompt scores all its tokens but the first, and the
first of the next chunk; the first token of a prompt has no score.

Shapes: P rows to score, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch

from cluster.messages import TokenLogprobs
from cluster.planning.step_memory import SCORED_ROWS
from router_service.outputs.top import top
from router_service.scheduling.sequence import Sequence


def token_logprobs(logits: torch.Tensor, token_ids: Seq[int], counts: Seq[int]) -> list[TokenLogprobs]:
    """For each row of `logits` [P, V] the log-probability of its token, and those of its `counts` most likely ones."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    of_tokens: list[float] = logprobs.gather(1, chosen)[:, 0].tolist()
    top_logprobs, top_ids = top(logprobs, max(counts))
    return [
        TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for logprob, count, ids, values in zip(of_tokens, counts, top_ids.tolist(), top_logprobs.tolist(), strict=True)
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
) -> list[Sequence]:
    """Append to each sequence's `prompt_logprobs`, a slice of rows at a time. Returns those with one not finite."""
    all_rows = list(rows)
    not_finite: dict[Sequence, None] = {}
    for at in range(0, len(all_rows), SCORED_ROWS):
        part = all_rows[at : at + SCORED_ROWS]
        scores = token_logprobs(
            to_logits(hidden[at : at + SCORED_ROWS]),
            [sequence.token_ids[position + 1] for sequence, position in part],
            [sequence.request.sampling.prompt_logprobs or 0 for sequence, _ in part],
        )
        for (sequence, position), score in zip(part, scores, strict=True):
            assert sequence.prompt_logprobs is not None, "only rows that were asked for are scored"
            assert len(sequence.prompt_logprobs) == position + 1, "scores come in order"
            sequence.prompt_logprobs.append(score)
            if not math.isfinite(score.token_logprob):
                not_finite[sequence] = None
    return list(not_finite)
