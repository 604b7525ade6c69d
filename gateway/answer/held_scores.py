"""Bounds what is told of each token in an answer that is held until it is whole. Knows deltas; knows no stream."""

from __future__ import annotations

from cluster.errors import InvalidRequest
from gateway.answer.choice import Delta

MAX_SCORES = 2**20  # log-probabilities, and lists of the experts of a layer: about 120 MB before they are JSON


class HeldScores:
    """Those of one answer, all choices together: `add` each delta."""

    def __init__(self, instead: str = "ask for a stream, or for fewer") -> None:
        """`instead`: what a client can do that asks for too many."""
        self._instead = instead
        self._number = 0

    def add(self, delta: Delta) -> None:
        """Raises InvalidRequest where they are more than may be held."""
        self._number += sum(1 + len(score.top) for score in delta.logprobs or ())
        self._number += sum(map(len, delta.routed_experts or ()))
        if self._number > MAX_SCORES:
            field, what = ("logprobs", "scores (tokens × candidates × choices)")
            if not delta.logprobs:
                field, what = "return_routed_experts", "lists of experts (tokens × layers × choices)"
            raise InvalidRequest(
                f"{field}: at most {MAX_SCORES} {what} in an answer that is held until it is whole; {self._instead}",
                param=field,
            )
