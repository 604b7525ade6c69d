"""Chooses which sequences run next. Knows token counts and blocks; knows nothing of tensors or Ray.

Continuous batching: each step takes every running sequence first (one token while decoding, a chunk of the prompt while
prefilling), then admits waiting ones while the token budget and the blocks last. When blocks run out, the sequence that
came last gives all of its blocks back and is computed again later (preemption by recompute).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from router_service.block_manager import BlockManager
from router_service.sequence import Sequence
from router_service.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` tokens of a sequence, from position `start` on, run in this step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the last known token, so that a new one can be sampled."""
        return self.is_complete and self.sequence.request.pooling is None

    def without_last(self) -> ScheduledSequence:
        """The same but for the last token, which is then computed again: no token was sampled from it."""
        return replace(self, num_tokens=self.num_tokens - 1)

    @property
    def embeds(self) -> bool:
        """Whether the step ends a prompt that becomes an embedding."""
        return self.is_complete and self.sequence.request.pooling is not None

    @property
    def is_complete(self) -> bool:
        """Whether the step reaches the last known token."""
        return self.start + self.num_tokens == len(self.sequence)


Batch = list[ScheduledSequence]


class Scheduler:
    """Owns the waiting and the running queue."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        assert max_model_len <= block_manager.num_blocks * block_manager.block_size, "one sequence must always fit"
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of arrival
        self.looking_at: Sequence | None = None  # by `schedule`: whose fault it is if that raises
        self.num_preemptions = 0
        self.num_prefix_cache_hit_tokens = 0
        self.num_prefix_cache_query_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its tenant."""
        self.waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks. Finished ones are removed by `update`."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.block_manager.free(sequence)

    def schedule(self) -> Batch:
        """The next step; empty only when nothing runs and nothing waits."""
        batch: Batch = []
        budget = self.max_num_batched_tokens
        preempted = False

        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.looking_at = self.running[index]
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self.block_manager.grow(sequence, sequence.num_computed_tokens + num_tokens):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                batch.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens))
                budget -= num_tokens
                index += 1

        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            sequence = self.looking_at = self.waiting.peek()
            num_cached = self.block_manager.take_prefix(sequence)
            num_tokens = min(len(sequence) - num_cached, budget)
            if not self.block_manager.grow(sequence, num_cached + num_tokens):
                self.block_manager.free(sequence)
                break
            self._admit(sequence, num_cached)
            batch.append(ScheduledSequence(sequence, num_cached, num_tokens))
            budget -= num_tokens

        self.looking_at = None
        return batch

    def update(self, batch: Batch, token_ids: list[int]) -> dict[Sequence, Exception]:
        """Take a step's results: `token_ids` are those sampled, one per scheduled sequence with `samples`, in order.

        Returns the sequences whose result could not be taken, with what was raised; they are still to be removed.
        """
        sampled = iter(token_ids)
        failures: dict[Sequence, Exception] = {}
        for scheduled in batch:
            token_id = next(sampled) if scheduled.samples else None
            try:
                self._take(scheduled, token_id)
            except Exception as error:
                failures[scheduled.sequence] = error
        return failures

    def check(self, sequences: Collection[Sequence]) -> None:
        """Raises AssertionError unless these sequences run or wait, no others do, and they hold what is held."""
        assert len(self.running) + len(self.waiting) == len(sequences), "a sequence is lost, or here twice"
        assert all(s in self.running or s in self.waiting for s in sequences), "a sequence is lost"
        self.block_manager.check(sequences)

    def _take(self, scheduled: ScheduledSequence, token_id: int | None) -> None:
        sequence = scheduled.sequence
        sequence.num_computed_tokens = scheduled.start + scheduled.num_tokens
        self.block_manager.publish(sequence)
        if token_id is not None:
            sequence.append(token_id, self.eos_token_ids, self.max_model_len)
        if scheduled.embeds or sequence.finish_reason is not None:
            self.remove(sequence)

    def _admit(self, sequence: Sequence, num_cached: int) -> None:
        self.waiting.pop()
        self.running.append(sequence)
        sequence.num_computed_tokens = num_cached
        if sequence.num_output_tokens == len(sequence.request.output_token_ids):  # not one that was preempted
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.num_prefix_cache_hit_tokens += num_cached
            self.num_prefix_cache_query_tokens += len(sequence)

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self.block_manager.free(sequence)
        sequence.num_computed_tokens = 0
        self.waiting.push_preempted(sequence)
        self.num_preemptions += 1
        return sequence
