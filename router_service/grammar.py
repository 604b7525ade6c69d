"""Where a sequence is in its grammar, and which tokens may come next. Knows xgrammar's matcher; compiles nothing.

Shapes: B rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch

from cluster.errors import InvalidRequest
from cluster.messages import Grammar, JsonSchema, Request

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

_MAX_STALL_S = 1.0  # CPU time of one token in one grammar: all other sequences wait for it


class GrammarState:
    """The grammar of one sequence. `error` is set once the sequence cannot go on."""

    __slots__ = ("_matcher", "_param", "error")

    def __init__(self, compiled: CompiledGrammar, request: Request) -> None:
        """Takes up after `request.output_token_ids`."""
        from xgrammar import GrammarMatcher  # slow to import

        assert request.grammar is not None
        self._matcher = GrammarMatcher(compiled)
        self._param = param(request.grammar)
        self.error: InvalidRequest | None = None
        for token_id in request.output_token_ids:
            self.accept(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the end of sequence has been accepted."""
        return bool(self._matcher.is_terminated())

    def accept(self, token_id: int) -> None:
        """Go on by one token. One that the grammar does not allow is an error."""
        if self.error is not None:
            return
        started = time.thread_time()
        if not self._matcher.accept_token(token_id):
            self.error = InvalidRequest(f"{self._param}: the output cannot go on within the grammar", self._param)
        self._check_cost(started)

    def fill(self, bitmask: torch.Tensor, row: int) -> None:
        """Set `bitmask[row]` to the tokens that may come next; with none, that is an error and all are."""
        if self.error is not None:
            return
        started = time.thread_time()
        self._matcher.fill_next_token_bitmask(bitmask, row)
        if not bitmask[row].any():
            bitmask[row] = -1
            self.error = InvalidRequest(f"{self._param}: nothing can satisfy the schema from here on", self._param)
        self._check_cost(started)

    def _check_cost(self, started: float) -> None:
        if time.thread_time() - started > _MAX_STALL_S:
            self.error = InvalidRequest(f"{self._param}: the schema takes too long to follow", self._param)


def param(grammar: Grammar) -> str:
    """The field of the client's request that the grammar comes from."""
    return grammar.param if isinstance(grammar, JsonSchema) else "tools"


def mask(logits: torch.Tensor, rows: Seq[int], states: Seq[GrammarState]) -> None:
    """Change `logits` [B, V] in place: -inf for every token that the grammar of its row does not allow."""
    from xgrammar import allocate_token_bitmask, apply_token_bitmask_inplace

    bitmask = allocate_token_bitmask(len(rows), logits.shape[1])  # [rows, V / 32] on the CPU, all allowed
    for index, state in enumerate(states):
        state.fill(bitmask, index)
    masked = logits[list(rows)]
    apply_token_bitmask_inplace(masked, bitmask.to(logits.device))
    logits[list(rows)] = masked
