"""Where a sequence is in its grammar, and which tokens may come next. Knows xgrammar's matcher; compiles nothing.

    step t samples a token ──▶ worker: accept it, find the tokens that may follow ──▶ step t + 1 samples among them

What may follow depends on the tokens only, so a worker finds it out while the model computes. A sequence whose worker
is late gets no token in a step; the others do. It is in no step again before the worker is done.

Shapes: V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest, MantaError
from cluster.messages import Grammar, HarmonyGrammar, ReasonedGrammar, Request, ToolCallGrammar
from router_service.grammar.workers import GrammarWorkers
from router_service.step_failures import told

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

# A grammar in which the readings of a text grow with it takes memory by the square, as it takes time: 0.3 s of it are
# some 100 MB. A token of any other is accepted in a tenth of this.
_MAX_ACCEPT_S = 5e-5  # CPU time of a token, over the whole output,
_MAX_ACCEPT_SHARE = 0.1  # and so much of `token_timeout_s` besides

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What comes next."""

    mask: NDArray[np.uint8] | None = None
    error: MantaError | None = None  # the sequence cannot go on
    is_over: bool = False  # nothing may follow, and nothing has to: of a model that has no token to end with


class GrammarState:
    """The grammar of one sequence. Its methods are called on one thread, once it is made."""

    __slots__ = (
        *("_bitmask", "_compiled", "_matcher", "_outlook", "_param", "_tenant", "_was_late", "_work", "_workers"),
        *("_accept_s", "_num_accepted"),
    )

    def __init__(self, compiled: CompiledGrammar, request: Request, workers: GrammarWorkers) -> None:
        """Takes up after `request.output_token_ids`; this may take long, so it is made in a thread."""
        from xgrammar import GrammarMatcher, allocate_token_bitmask  # slow to import

        assert request.grammar is not None
        self._compiled = compiled
        self._matcher = GrammarMatcher(compiled)
        self._bitmask = allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)  # on the CPU
        self._param = param(request.grammar)
        self._tenant = request.cache_salt
        self._workers = workers
        self._work: Future[_Outlook] | None = None
        self._was_late = False
        self._accept_s = 0.0  # CPU time
        self._num_accepted = 0
        self._outlook = self._follow(request.output_token_ids)

    def accept(self, token_id: int) -> None:
        """Go on by one token, in a worker. `is_ready` says when that is done."""
        self._settle(timeout_s=None)
        self._was_late = False
        self._work = self._workers.submit(self._compiled, self._tenant, lambda: self._follow([token_id]))

    def cancel(self) -> None:
        """Nobody waits for what comes next."""
        if self._work is not None:
            self._work.cancel()

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Whether the next token can be sampled, waiting for at most so long."""
        if self._settle(timeout_s):
            return self._outlook.error is None and not self._outlook.is_over
        self._was_late = True
        return False

    @property
    def is_late(self) -> bool:
        """Whether a step was in vain, as the next one would be now."""
        return self._was_late and not self._settle(0.0)

    @property
    def mask(self) -> NDArray[np.uint8] | None:
        """[V / 8, rounded up]: a bit for every token that may come next, from the lowest up; None: any may."""
        assert self._work is None, "it is ready"
        return self._outlook.mask

    @property
    def error(self) -> MantaError | None:
        """Why the sequence cannot go on, as far as it is known."""
        self._settle(0.0)
        return self._outlook.error

    @property
    def is_over(self) -> bool:
        """Whether it is known that the answer is complete and that no token may follow, not even one that ends it."""
        return self._work is None and self._outlook.is_over

    def _settle(self, timeout_s: float | None) -> bool:
        """Take over what the worker has found. Whether nothing is outstanding."""
        if self._work is not None:
            try:
                self._outlook = self._work.result(timeout_s)
            except TimeoutError:
                return False
            self._work = None
        return True

    def _follow(self, token_ids: Seq[int]) -> _Outlook:
        """In a worker: accept tokens, and look what may follow."""
        try:
            return self._look(token_ids)
        except Exception as error:
            if not isinstance(error, MantaError):
                logger.exception("%s could not be followed", self._param)
            return _Outlook(error=told(error))

    def _look(self, token_ids: Seq[int]) -> _Outlook:
        """Raises InvalidRequest."""
        started = time.thread_time()
        for token_id in token_ids:
            if not self._matcher.accept_token(token_id):
                raise self._wrong("the output cannot go on within the grammar")
        self._accept_s += time.thread_time() - started
        self._num_accepted += len(token_ids)
        if self._matcher.is_terminated():
            return _Outlook()
        is_bound = self._matcher.fill_next_token_bitmask(self._bitmask)
        seconds = (time.thread_time() - started) / max(1, len(token_ids))
        self._workers.note_cost(self._compiled, seconds)
        if seconds > self._workers.token_timeout_s:
            raise self._wrong("it takes too long to follow")
        if self._accept_s > _MAX_ACCEPT_SHARE * self._workers.token_timeout_s + _MAX_ACCEPT_S * self._num_accepted:
            raise self._wrong("too ambiguous to be followed this far: a text can be read in too many ways")
        mask = self._bitmask.numpy().view(np.uint8)[0]
        if not mask.any():
            if self._matcher.is_completed():
                return _Outlook(is_over=True)
            raise self._wrong("nothing can satisfy it from here on")
        return _Outlook(mask if is_bound else None)

    def _wrong(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}: {what}", self._param)


def param(grammar: Grammar) -> str:
    """The field of the client's request that the grammar comes from."""
    if isinstance(grammar, ReasonedGrammar | HarmonyGrammar):
        return param(grammar.answer)
    return "tools" if isinstance(grammar, ToolCallGrammar) else grammar.param
