"""What one sequence's parameters change in its logits, as arrays that are made once. Knows no batch and no device.

Token counts are kept up to date token by token, so a step never looks through a context, however long it is.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from cluster.messages import Request, SamplingParams

_IDS_AT_ONCE = 2048  # are counted before other threads get their turn


def has_adjustments(sampling: SamplingParams) -> bool:
    """Whether any parameter changes logits; a grammar does so on its own."""
    return bool(
        sampling.logit_bias
        or sampling.min_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


class Adjustments:
    """Bias, stop tokens and penalties of one sequence."""

    __slots__ = (
        "_frequency",
        "_num_counted",
        "_output_counts",
        "_presence",
        "_sampling",
        "bias",
        "bias_ids",
        "divisors",
        "penalties",
        "stop_ids",
    )

    def __init__(self, request: Request, vocab_size: int) -> None:
        """Counts the request's tokens, 32,000 in about a millisecond. Raises InvalidRequest for ids past them all."""
        self._sampling = sampling = request.sampling
        self.bias_ids = _ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias], vocab_size)
        self.bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self.stop_ids = _ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
        # float32 [V], 1 for tokens that have not been seen; None: no repetition penalty.
        self.divisors = None if sampling.repetition_penalty == 1.0 else np.ones(vocab_size, np.float32)
        # float32 [V], what is taken off; None: no such penalties.
        has_penalties = sampling.presence_penalty or sampling.frequency_penalty
        self.penalties = np.zeros(vocab_size, np.float32) if has_penalties else None
        self._presence, self._frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
        self._output_counts: Counter[int] = Counter()
        self._num_counted = len(request.prompt_token_ids) + len(request.output_token_ids)
        for token_ids, are_output in ((request.prompt_token_ids, False), (request.output_token_ids, True)):
            for at in range(0, len(token_ids), _IDS_AT_ONCE):
                self._count(token_ids[at : at + _IDS_AT_ONCE], are_output)
                time.sleep(0)  # numpy keeps the interpreter's lock, which the engine's thread may want

    @property
    def repetition_penalty(self) -> float:
        """What `divisors` holds for tokens that have been seen."""
        return self._sampling.repetition_penalty

    def catch_up(self, token_ids: list[int]) -> None:
        """Count what has been appended to a sequence's tokens since the last time."""
        for token_id in token_ids[self._num_counted :]:
            self._count_output(token_id)
        self._num_counted = len(token_ids)

    def _count_output(self, token_id: int) -> None:
        if self.divisors is not None:
            self.divisors[token_id] = self._sampling.repetition_penalty
        if self.penalties is not None:
            self._output_counts[token_id] += 1
            self.penalties[token_id] = self._presence + self._frequency * np.float32(self._output_counts[token_id])

    def _count(self, token_ids: Seq[int], are_output: bool) -> None:
        if self.divisors is not None:
            self.divisors[np.array(token_ids)] = self._sampling.repetition_penalty
        if self.penalties is not None and are_output:
            self._output_counts.update(token_ids)
            used = list(set(token_ids))
            counts = np.array([self._output_counts[token_id] for token_id in used], np.float32)
            self.penalties[used] = self._presence + self._frequency * counts


def _ids(param: str, token_ids: Seq[int], vocab_size: int) -> NDArray[np.int64]:
    """Checked: rows of a batch are changed as one, and an id past its own row would reach the next."""
    ids = np.array(token_ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise InvalidRequest(f"{param}: a token id is not in the vocabulary of {vocab_size}", param)
    return ids
