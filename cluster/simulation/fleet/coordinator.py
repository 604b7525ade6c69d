"""The sequences of one coordinator: who waits, whose prompt is computed, who decodes. Knows no experts.

As the engine's scheduler has it: a step takes a token of every decoding sequence and, of prompts, a quarter of its
tokens beside them, or all of them where nobody decodes. Prompts are computed one after the other, admitted when the
cache holds them and an eighth of what runs besides; where it is full after all, the newest gives way and is computed
again. What is left out: tenants, prefix caching, and that a short prompt passes a long one.

    V   tokens that each decoding sequence has had since the beginning; one that began at V0 ends at V0 + its tokens
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Literal

from cluster.config import EngineConfig
from cluster.simulation.fleet.step_costs import Work
from cluster.simulation.fleet.trace import Arrival

LEAST_PROMPT_TOKENS = 64  # beside decoding sequences, as the scheduler has it
GROWTH = 8  # one in so many tokens of the cache is kept for those who run
NOTHING = 1e-9

State = Literal["waiting", "finished", "shed", "failed"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request, and what came of it."""

    arrival: Arrival
    number: int
    state: State = "waiting"
    first_token_s: float = 0.0  # moment; 0: none yet
    finished_s: float = 0.0
    had: float = 0.0  # tokens before it gave way
    began_at: float = 0.0  # V
    prompt_left: float = 0.0
    decodes: bool = False

    @property
    def prompt(self) -> float:
        """Tokens to compute before the next is sampled."""
        return self.arrival.prompt_tokens + self.had


@dataclass
class Coordinator:
    """One replica's."""

    engine: EngineConfig
    kv_tokens: int
    name: int = 0
    draining: bool = False
    now: float = 0.0
    step_s: float = 0.0  # as long as nothing happens
    chunk: float = 0.0  # tokens of prompts in it
    version: int = 0  # of what the next event was computed from
    waiting: deque[Sequence] = field(default_factory=deque)
    prompts: deque[Sequence] = field(default_factory=deque)
    _decoding: list[tuple[float, int, Sequence]] = field(default_factory=list)  # by the V at which each ends
    _num_decoding: int = 0
    _v: float = 0.0
    _cached: float = 0.0  # tokens of decoding sequences when they began, less V then
    _in_prompts: float = 0.0  # of those whose prompts are computed

    @property
    def running(self) -> int:
        """Sequences with a place in the batch."""
        return len(self.prompts) + self._num_decoding

    @property
    def present(self) -> int:
        """Running or waiting."""
        return self.running + len(self.waiting)

    @property
    def kv_used(self) -> float:
        """Tokens."""
        return self._cached + self._num_decoding * self._v + self._in_prompts

    @property
    def used_fraction(self) -> float:
        """What a coordinator reports: of its cache, or of its batch if that is more."""
        return max(self.kv_used / self.kv_tokens, self.running / self.engine.max_num_seqs)

    def work(self) -> Work:
        """Its next step."""
        decoding = self._num_decoding
        context = (self.kv_used - self._in_prompts) / decoding if decoding else 0.0
        if not self.prompts:
            return Work(decoding, context)
        budget = self.engine.max_num_batched_tokens
        if decoding:
            budget = min(max(budget // 4, LEAST_PROMPT_TOKENS), budget)
        first = self.prompts[0]
        chunk = min(float(budget), sum(sequence.prompt_left for sequence in self.prompts))
        return Work(decoding, context, max(1.0, chunk), first.prompt - first.prompt_left)

    def settle(self, now: float) -> None:
        """Let it be `now`; nothing ends before that."""
        if self.step_s > 0 and now > self.now:
            steps = (now - self.now) / self.step_s
            if self._num_decoding:
                self._v += steps
            if self.prompts:
                self.prompts[0].prompt_left = max(0.0, self.prompts[0].prompt_left - steps * self.chunk)
        self.now = now

    def plan(self, step_s: float, chunk: float) -> None:
        """From now on a step takes so long and computes so many tokens of prompts."""
        self.step_s, self.chunk = step_s, chunk

    def next_s(self) -> float | None:
        """Until something ends. None: nothing runs."""
        if not self.running:
            return None
        steps = float("inf")
        if self._decoding:
            while self._decoding and not self._decoding[0][2].decodes:
                heappop(self._decoding)
            if self._decoding:
                steps = max(0.0, self._decoding[0][0] - self._v)
        if self.prompts:
            steps = min(steps, self.prompts[0].prompt_left / self.chunk)
        return steps * self.step_s

    def take(self, sequence: Sequence) -> None:
        """A request that arrives."""
        self.waiting.append(sequence)

    def advance(self, deadline_s: float) -> list[Sequence]:
        """What has happened until now: prompts that are computed, sequences that ended, others that begin.

        Returns those that ended, finished or failed by their deadline.
        """
        ended: list[Sequence] = []
        while self.prompts and self.prompts[0].prompt_left <= NOTHING * self.prompts[0].prompt + 1e-6:
            sequence = self.prompts.popleft()
            self._in_prompts -= sequence.prompt
            if not sequence.first_token_s:
                sequence.first_token_s = self.now
            tokens_left = sequence.arrival.output_tokens - sequence.had - 1
            if tokens_left <= 0:
                ended.append(self._end(sequence, deadline_s))
                continue
            sequence.began_at, sequence.decodes = self._v, True
            self._num_decoding += 1
            self._cached += sequence.prompt - self._v
            heappush(self._decoding, (self._v + tokens_left, sequence.number, sequence))
        while self._decoding and self._decoding[0][0] <= self._v + 1e-6:
            _, _, sequence = heappop(self._decoding)
            if sequence.decodes:
                self._stop_decoding(sequence)
                ended.append(self._end(sequence, deadline_s))
        while self.kv_used > self.kv_tokens and self._num_decoding > 1:
            self._preempt()
        ended += self._admit(deadline_s)
        return ended

    def _admit(self, deadline_s: float) -> list[Sequence]:
        failed = []
        while self.waiting:
            sequence = self.waiting[0]
            if self.now - sequence.arrival.at_s > deadline_s:
                sequence.state = "failed"
                failed.append(self.waiting.popleft())
                continue
            needed = self.kv_used * (1 + 1 / GROWTH) + sequence.prompt
            if self.running >= self.engine.max_num_seqs or (self.running and needed > self.kv_tokens):
                break
            self.waiting.popleft()
            sequence.prompt_left = sequence.prompt
            self._in_prompts += sequence.prompt
            self.prompts.append(sequence)
        return failed

    def _stop_decoding(self, sequence: Sequence) -> None:
        sequence.decodes = False
        self._num_decoding -= 1
        self._cached -= sequence.prompt - sequence.began_at
        if not self._num_decoding:
            self._cached = 0.0

    def _end(self, sequence: Sequence, deadline_s: float) -> Sequence:
        sequence.finished_s = self.now
        late = self.now - sequence.arrival.at_s > deadline_s
        sequence.state = "failed" if late else "finished"
        return sequence

    def _preempt(self) -> None:
        """The newest that decodes gives its blocks back, and is the next to be computed again."""
        newest = max((entry for entry in self._decoding if entry[2].decodes), key=lambda entry: entry[1])
        self._decoding.remove(newest)
        heapify(self._decoding)
        sequence = newest[2]
        self._stop_decoding(sequence)
        sequence.had += self._v - sequence.began_at + 1
        self.waiting.appendleft(sequence)
