"""A Sequence: one choice of a request while the engine works on it. Knows token ids and block numbers, no tensors."""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Any

from cluster.messages import FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from router_service.adjustments import Adjustments
    from router_service.grammar.grammar import GrammarState


class Sequence:
    """Tokens of one choice, how many of them are in the KV cache, and in which blocks.

    Invariant: 0 ≤ num_computed_tokens ≤ len ≤ len(block_table) · block_size + 1 while it runs. Its length counts a
    token that the host has not read yet, of which there is at most one.
    """

    __slots__ = (
        "adjustments",
        "arrived_at",
        "block_hashes",
        "block_table",
        "finish_reason",
        "first_token_at",
        "grammar",
        "last_step",
        "needs_host",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_released_blocks",
        "pending_row",
        "pooled",
        "prompt_logprobs",
        "refused",
        "request",
        "routed_experts",
        "scheduled_at",
        "stop_token_id",
        "token_ids",
        "waits_since",
        "was_admitted",
    )

    def __init__(
        self, request: Request, grammar: GrammarState | None = None, adjustments: Adjustments | None = None
    ) -> None:
        """`grammar` has accepted the request's output tokens already. The sampler makes `adjustments` if need be."""
        self.request = request
        self.grammar = grammar
        self.adjustments = adjustments
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.output_token_ids]
        # Its last token is sampled, and not read yet: the row that has it among those of the step under way.
        self.pending_row: int | None = None
        sampling = request.sampling
        self.needs_host = (  # to read each token before the next is chosen
            grammar is not None
            or sampling.repetition_penalty != 1.0
            or bool(sampling.presence_penalty or sampling.frequency_penalty)
            or sampling.routed_experts
        )
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # prompt tokens that the prefix cache spared, when first scheduled
        self.block_table = array("i")  # a step takes its numbers as they lie in memory
        self.block_hashes: list[bytes] = []  # of the full blocks, a chain from the first token on
        self.num_published_blocks = 0  # of its table, from the first on; whatever the prefix cache made of them
        self.num_released_blocks = 0  # of its table, from the first on: behind the sliding window, null now
        self.was_admitted = False  # preempted ones stay so
        self.last_step = 0  # in which it got a token
        self.refused: tuple[int, int] | None = None  # the step in which blocks were missing, and how many were free
        self.waits_since: int | None = None  # how many of other tenants had been admitted when it first had to wait
        # Of the prompt tokens scored so far, the first is None; all None when they are not asked for, or sent already.
        asked = sampling.prompt_logprobs is not None and not request.output_token_ids
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if asked else None
        self.routed_experts: bytes | None = None  # uint16 [layers, top_k] of the latest token, when asked for
        self.pooled: Any = None  # of an embedding request: pooling.Pooled, what the pooler has so far
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.arrived_at = time.perf_counter()
        self.scheduled_at: float | None = None  # the begin of its first step
        self.first_token_at: float | None = None  # the end of the step that made it

    @property
    def queue_s(self) -> float:
        """From its arrival to its first step; 0 before."""
        return 0.0 if self.scheduled_at is None else self.scheduled_at - self.arrived_at

    def note_step(self, ended: float) -> None:
        """A step that it was part of, for its times."""
        if self.first_token_at is None and self.num_output_tokens > len(self.request.output_token_ids):
            self.first_token_at = ended

    def __len__(self) -> int:
        return len(self.token_ids) + (self.pending_row is not None)

    @property
    def tenant(self) -> str:
        """Whose it is: those who share the prefix cache, an API key."""
        return self.request.cache_salt

    @property
    def priority(self) -> int:
        """Among its tenant's the lower is served earlier; those who share one are served as they come."""
        return self.request.priority

    @property
    def may_be_displaced(self) -> bool:
        """Whether certainly nothing was computed for its client's request. Siblings may be anywhere."""
        return not (self.was_admitted or self.request.output_token_ids or self.request.num_siblings)

    @property
    def num_output_tokens(self) -> int:
        """Generated so far, resumed ones included."""
        return len(self) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache yet: 1 while decoding."""
        return len(self) - self.num_computed_tokens

    def will_end(self, max_model_len: int) -> bool:
        """Whether its pending token, whatever it is, is the last."""
        return self.pending_row is not None and (
            self.num_output_tokens >= self.request.sampling.max_tokens or len(self) >= max_model_len
        )

    @property
    def is_held_up(self) -> bool:
        """Whether its grammar does not say yet which token may come, long after the last."""
        return self.grammar is not None and self.grammar.is_late

    @property
    def is_complete(self) -> bool:
        """Whether its grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.is_over

    @property
    def may_skip_prefix(self) -> bool:
        """Whether a cached beginning need not be computed: not while its scores or hidden states are wanted."""
        return self.is_prompt_scored and self.request.pooling is None

    @property
    def is_prompt_scored(self) -> bool:
        """Whether the prompt's log-probabilities are known, or not wanted."""
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens

    def append(self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        """Add a sampled token and decide whether the sequence ends with it."""
        self.token_ids.append(token_id)
        self.check_finished(eos_token_ids, max_model_len)
        if self.grammar is not None and self.finish_reason is None:
            self.grammar.accept(token_id)

    def check_finished(self, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        """Set `finish_reason` when the last output token ends the sequence. A resumed one may have ended already."""
        if not self.num_output_tokens:
            return
        token_id = self.token_ids[-1]
        sampling = self.request.sampling
        # A grammar lets an end come only where it is complete, whatever min_tokens and ignore_eos say.
        closed = self.grammar is not None and token_id in eos_token_ids
        if closed or (
            self.num_output_tokens >= sampling.min_tokens
            and (token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos))
        ):
            self.finish_reason = "stop"
            self.stop_token_id = token_id
        elif self.num_output_tokens >= sampling.max_tokens or len(self.token_ids) >= max_model_len:
            self.finish_reason = "length"
