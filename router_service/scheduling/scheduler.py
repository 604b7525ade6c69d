"""Chooses which sequences run next. Knows token counts, blocks and tenants; knows nothing of tensors or Ray.

Continuous batching. A step takes the next token of every decoding sequence first, and chunks of prompts with the rest
of its token budget B. Its promises, R being the sequences that run and T the tenants (API keys) who have any:

- **Nobody who runs starves.** The sequence that has waited longest for a token gets one in every step, so each gets one
  at least every R steps (2R with B = 1), however small B is; alone, a tenant gets ⌈R / (3B/4)⌉.
- **Steps stay short.** While anybody decodes, prompts get at most a quarter of B (or 64 tokens). Tokens count by what
  they cost (`step_cost.py`): the chunks of a long prompt become shorter as its context grows. While tenants share the
  engine, their decoding costs at most as much in a step, and those who got least in it go first.
- **A priority is the tenant's own affair.** It orders what a tenant has waiting, and says which of its sequences gives
  way; to others it means nothing. So nobody is starved by another's, and a tenant may starve its own.
- **Prompts do not wait for long ones.** The budget for prompts goes to the tenants in even shares, and half of a
  tenant's share to its short prompts, unless one kind is more urgent. Of each kind it computes one after the other, by
  priority and arrival. Whoever has begun goes on at least every 2T steps (4T with B < 4), but for more urgent ones.
- **Slots and blocks are shared.** Where one of them is short, the tenant that holds most gives way to one that would
  hold less even then: its newest sequence gives its blocks back, and is computed again later (preemption by recompute).
  While tenants share the engine, and for `RECENT_STEPS` more, the last eighth of both stays free for others, so that
  a tenant who comes and goes has nobody preempted each time.
- **Work is not thrown away.** A prompt is admitted when there are blocks for all of it, and for all who run to grow by
  an eighth of its length. One whose beginning is being computed by another waits, and takes it from the prefix cache.
- **A prompt that does not fit holds up others only after `max_num_seqs` of them have passed it.** Then none of its own
  tenant passes it any more, and none of another's where those hold what it needs. Of those whom
  other tenants have kept waiting so long one at a time keeps its blocks for `KEPT_TOKENS` tokens, whatever it holds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace
from math import inf

from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.sequence import Sequence
from router_service.scheduling.step_cost import StepCost
from router_service.scheduling.waiting_queue import Line, WaitingQueue

RECENT_STEPS = 256  # for so long a tenant that has nothing to do is expected back
RETRY_STEPS = 16  # a sequence whose blocks were missing is looked at again after so many, or when more are free
SPARE = 8  # one in so many of slots and blocks is kept for tenants who come next
KEPT_TOKENS = 256  # the fewer, the more often a long prompt is computed again for them
LEAST_PROMPT_TOKENS = 64  # beside decoding sequences, where a quarter of the budget is less


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` tokens of a sequence, from position `start` on, run in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    is_complete: bool = field(init=False)  # whether the step reaches the last token that there is as it is made

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_complete", self.start + self.num_tokens == len(self.sequence))

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


Batch = list[ScheduledSequence]


@dataclass(slots=True)
class _Tenant:
    """What the scheduler remembers of one."""

    last_present: int = 0  # the step in which something of theirs ran or waited
    last_turn: int = 0  # the step in which a prompt of theirs was last computed
    num_admitted: int = 0
    long_first: bool = False  # whose turn it is, of the two lines


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
        cost: StepCost | None = None,
        sliding_window: int | None = None,
    ) -> None:
        """`cost`: None for one that grows with no context."""
        assert max_model_len <= block_manager.num_blocks * block_manager.block_size, "one sequence must always fit"
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.cost = cost or StepCost()
        self.sliding_window = sliding_window
        # In cost, of the prompts beside decoding sequences, and of those where tenants share the engine.
        self.shared_budget = min(max(max_num_batched_tokens // 4, LEAST_PROMPT_TOKENS), max_num_batched_tokens)
        self.waiting = WaitingQueue(longest_short=self.shared_budget)
        self.running: list[Sequence] = []  # in the order of admission
        self.looking_at: Sequence | None = None  # by `schedule`: whose fault it is if that raises
        self.num_preemptions = 0
        self.num_prefix_cache_hit_tokens = 0
        self.num_prefix_cache_query_tokens = 0
        self._num_steps = 0
        self._num_running: Counter[str] = Counter()  # by tenant
        self._tenants: dict[str, _Tenant] = {}  # present now or recently
        self._blocked: Sequence | None = None  # has waited for blocks longer than any other
        self._num_passed = 0  # sequences that were admitted meanwhile
        self._num_admitted = 0
        self._kept: Sequence | None = None  # gives way to nobody
        self._kept_until = 0  # before it has so many tokens
        # Of the step that is being made:
        self._batch: dict[Sequence, ScheduledSequence] = {}
        self._in_progress: dict[Line, list[Sequence]] = {}  # whose prompts are computed in part; none is empty
        self._being_computed: set[bytes] = set()  # the next block of each prompt in progress

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its line."""
        self.waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks. Finished ones are removed by `update`."""
        if sequence in self.running:
            self._stop_running(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence is self._blocked:
            self._blocked, self._num_passed = self._longest_waiting(), 0
        self.block_manager.free(sequence)

    def schedule(self) -> Batch:
        """The next step. Empty when nothing runs and nothing waits, when the one it was for gave its blocks back, or
        when all are held up by their grammars."""
        self._num_steps += 1
        self._batch = {}
        is_shared = self._note_tenants()
        self._schedule_prompts()
        self._schedule_decodes(is_shared)
        self.looking_at = None
        return sorted(self._batch.values(), key=lambda scheduled: scheduled.num_tokens > 1)

    def advance(self, batch: Batch) -> None:
        """A step in which each of these gets a token is under way: the next one can be made before that is read.

        `update` has to follow, for those that are still here, before anything is advanced again.
        """
        for row, scheduled in enumerate(batch):
            assert scheduled.samples, "what a prompt makes is not waited for by the next step"
            scheduled.sequence.num_computed_tokens = scheduled.start + scheduled.num_tokens
            scheduled.sequence.pending_row = row

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
        assert self._num_running == Counter(sequence.tenant for sequence in self.running)
        self.block_manager.check(sequences)

    def _take(self, scheduled: ScheduledSequence, token_id: int | None) -> None:
        sequence = scheduled.sequence
        sequence.pending_row = None
        if sequence.block_table:  # else it gave them back while the step was under way
            sequence.num_computed_tokens = scheduled.start + scheduled.num_tokens
            self.block_manager.publish(sequence)
            if self.sliding_window is not None:
                self.block_manager.release(sequence, sequence.num_computed_tokens - self.sliding_window + 1)
        if token_id is not None:
            sequence.append(token_id, self.eos_token_ids, self.max_model_len)
        if scheduled.embeds or sequence.finish_reason is not None:
            self.remove(sequence)

    def _note_tenants(self) -> bool:
        """Remember who is there. Whether that is more than one."""
        present = {*self._num_running, *self.waiting.tenants()}
        for name in present:
            self._tenants.setdefault(name, _Tenant()).last_present = self._num_steps
        gone = [name for name, one in self._tenants.items() if self._num_steps - one.last_present > RECENT_STEPS]
        for name in gone:
            del self._tenants[name]
        return len(present) > 1

    # Prompts

    def _schedule_prompts(self) -> None:
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        if not prefilling and not self.waiting:
            return
        self._in_progress = {}
        for sequence in prefilling:
            self._in_progress.setdefault(self.waiting.line_of(sequence), []).append(sequence)
        for line in self._in_progress.values():
            line.sort(key=lambda one: one.priority)
        self._being_computed = set()
        for sequence in [line[0] for line in self._in_progress.values()]:
            self.looking_at = sequence
            self._note_computing(sequence)

        budget = self._prompt_budget(len(self.running) - len(prefilling))
        tenants = sorted(
            dict.fromkeys([*(name for name, _ in self._in_progress), *self.waiting.tenants()]),
            key=lambda name: self._tenants[name].last_turn,
        )
        for place, name in enumerate(tenants):
            if budget > 0:
                budget -= self._serve(name, -(-budget // (len(tenants) - place)))
        for name in tenants:  # what others left
            if budget > 0:
                budget -= self._serve(name, budget)

    def _prompt_budget(self, num_decoding: int) -> int:
        """In cost. Decoding sequences are served first, but for what keeps prompts from starving."""
        total = self.max_num_batched_tokens
        if num_decoding == 0:
            return total
        kept = max(total // 4, self._num_steps % 2)  # every second step, where a quarter is less than a token
        return min(total - min(num_decoding, total - kept), self.shared_budget)

    def _serve(self, name: str, budget: int) -> int:
        """Spend at most about `budget` on prompts of a tenant. Returns what was spent."""
        tenant = self._tenants[name]
        first, second = (name, tenant.long_first), (name, not tenant.long_first)
        urgency, of_second = self._urgency(first), self._urgency(second)
        if of_second < urgency:
            first, second = second, first
        spent = self._serve_line(first, (budget + 1) // 2 if urgency == of_second else budget)
        if spent and (urgency == of_second or inf == of_second):
            tenant.long_first = not tenant.long_first
        spent += self._serve_line(second, budget - spent)
        if spent:
            tenant.last_turn = self._num_steps
        return spent

    def _urgency(self, line: Line) -> float:
        """The lowest priority in a line, of those who wait or are computed in part; infinite where nobody is."""
        heads = (self._first_in_progress(line), self.waiting.head(line))
        return min((one.priority for one in heads if one is not None), default=inf)

    def _first_in_progress(self, line: Line) -> Sequence | None:
        return self._in_progress[line][0] if line in self._in_progress else None

    def _next(self, line: Line) -> Sequence | None:
        """Who goes on, or is admitted: of one priority who has begun."""
        sequence, head = self._first_in_progress(line), self.waiting.head(line)
        if head is not None and (sequence is None or head.priority < sequence.priority):
            return self._admit(line) or sequence
        return sequence

    def _serve_line(self, line: Line, budget: int) -> int:
        """One prompt after the other, so that at most one of a line and a priority is computed in part."""
        spent = 0
        while spent < budget:
            sequence = self.looking_at = self._next(line)
            if sequence is None:
                break
            in_progress = self._in_progress.setdefault(line, [])
            if sequence not in in_progress:
                in_progress.insert(0, sequence)
            spent += self._extend(sequence, budget - spent)
            if not self._batch[sequence].is_complete:
                break
            self._no_longer_in_progress(sequence, line)
        return spent

    def _no_longer_in_progress(self, sequence: Sequence, line: Line) -> None:
        in_progress = self._in_progress.get(line, [])
        if sequence in in_progress:
            in_progress.remove(sequence)
        if not in_progress:
            self._in_progress.pop(line, None)

    def _extend(self, sequence: Sequence, budget: int) -> int:
        """Compute more of a prompt in this step, at least one token. Returns what it costs."""
        scheduled = self._batch.get(sequence)
        start, given = sequence.num_computed_tokens, 0 if scheduled is None else scheduled.num_tokens
        scored = not sequence.is_prompt_scored
        num_tokens = min(len(sequence) - start - given, self.cost.longest_chunk(start + given, budget, scored=scored))
        if num_tokens == 0:
            if given:
                return budget  # too little to go on with
            num_tokens = 1
        self._batch[sequence] = ScheduledSequence(sequence, start, given + num_tokens)
        sequence.last_step = self._num_steps
        return self.cost.chunk(start + given, num_tokens, scored=scored)

    # Admission

    def _admit(self, line: Line) -> Sequence | None:
        """Start the next of a line, if it may and there is room."""
        sequence = self.waiting.head(line)
        if sequence is None or sequence.pending_row is not None or not self._has_slot(sequence.tenant):
            return None
        if self._was_just_refused(sequence) or not self._may_pass(sequence):
            return None
        self.looking_at = sequence
        prefix = self.block_manager.find_prefix(sequence)
        if self.block_manager.would_take(sequence, prefix) in self._being_computed:
            return None
        leaving = self._make_room(sequence, self.block_manager.num_missing(sequence, prefix))
        if leaving is None:
            sequence.refused = (self._num_steps, self.block_manager.num_free_blocks)
            self._note_waiting(sequence)
            if self._blocked is None:
                self._blocked, self._num_passed = sequence, 0
            return None
        for one in leaving:
            self._preempt(one)
        self._start(sequence)
        return sequence

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._num_running[sequence.tenant] += 1
        self._num_passed += 1
        self._num_admitted += 1
        self._tenants[sequence.tenant].num_admitted += 1
        for one in self.waiting.less_urgent(sequence):  # they wait for their own tenant, and hold up nobody for that
            if one.waits_since is not None:
                one.waits_since = self._num_admitted_beside(one.tenant)
        if self._may_keep_its_blocks(sequence):
            self._kept, self._kept_until = sequence, len(sequence) + KEPT_TOKENS
            sequence.waits_since = None
        if sequence is self._blocked:
            self._blocked, self._num_passed = self._longest_waiting(), 0
        sequence.refused = None
        num_cached = sequence.num_computed_tokens = self.block_manager.take_prefix(sequence)
        has_blocks = self.block_manager.grow(sequence, len(sequence))
        assert has_blocks, "room was made"
        self._note_computing(sequence)
        if not sequence.was_admitted:  # else it finds what it computed itself
            sequence.was_admitted = True
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.num_prefix_cache_hit_tokens += num_cached
            self.num_prefix_cache_query_tokens += len(sequence)

    def _note_computing(self, sequence: Sequence) -> None:
        block = self.block_manager.will_compute(sequence)
        if block is not None:
            self._being_computed.add(block)

    def _was_just_refused(self, sequence: Sequence) -> bool:
        """Whether looking again for its blocks would be in vain."""
        if sequence.refused is None:
            return False
        step, num_free = sequence.refused
        return self._num_steps - step < RETRY_STEPS and self.block_manager.num_free_blocks <= num_free

    def _may_pass(self, sequence: Sequence) -> bool:
        """Whether it may be admitted before the one that has waited longest for blocks."""
        blocked = self._blocked
        if blocked is None or blocked is sequence:
            return True
        if blocked.tenant == sequence.tenant and sequence.priority < blocked.priority:
            return True
        if blocked.tenant == sequence.tenant:
            line = self.waiting.line_of(blocked)  # a preempted one may stand before it
            is_before = self.waiting.line_of(sequence) == line and self.waiting.head(line) is not blocked
            return is_before or self._num_passed < self.max_num_seqs
        if not self._is_overdue(blocked):
            return True
        needed = -(-len(blocked) // self.block_manager.block_size) + self._reserve(blocked)
        return self.block_manager.num_free_blocks + self.block_manager.held[blocked.tenant] >= needed

    def _note_waiting(self, sequence: Sequence) -> None:
        if sequence.waits_since is None:
            sequence.waits_since = self._num_admitted_beside(sequence.tenant)

    def _is_overdue(self, sequence: Sequence) -> bool:
        return self._num_passed_by(sequence) >= self.max_num_seqs

    def _num_passed_by(self, sequence: Sequence) -> int:
        """How many of other tenants have been admitted since it first had to wait for blocks."""
        since = sequence.waits_since
        return 0 if since is None else self._num_admitted_beside(sequence.tenant) - since

    def _may_keep_its_blocks(self, sequence: Sequence) -> bool:
        """Whether it is its turn to: no other tenant's has waited longer, and no other keeps its own."""
        if not self._is_overdue(sequence) or not (self._kept is None or self._gives_way(self._kept)):
            return False
        others = [one for one in self.waiting.heads() if one.tenant != sequence.tenant]
        return all(self._num_passed_by(one) <= self._num_passed_by(sequence) for one in others)

    def _longest_waiting(self) -> Sequence | None:
        waiting = (sequence for sequence in self.waiting.heads() if sequence.waits_since is not None)
        return max(waiting, key=self._num_passed_by, default=None)

    def _gives_way(self, sequence: Sequence) -> bool:
        return sequence is not self._kept or len(sequence) >= self._kept_until

    def _num_admitted_beside(self, tenant: str) -> int:
        return self._num_admitted - self._tenants[tenant].num_admitted

    def _has_slot(self, tenant: str) -> bool:
        """Whether one is free for this tenant, or another has to give one away."""
        mine = self._num_running[tenant]
        if mine >= self._part(self.max_num_seqs, tenant):
            return False
        return len(self.running) < self.max_num_seqs or max(self._num_running.values()) > mine + 1

    def _part(self, whole: int, tenant: str) -> int:
        """How much of all slots or blocks a tenant that runs may have."""
        return whole - whole // SPARE if len(self._tenants) > 1 and self._num_running[tenant] else whole

    def _make_room(self, sequence: Sequence, num_missing: int) -> list[Sequence] | None:
        """Who has to leave so that there are a slot and so many blocks more; None if it has to wait.

        The least urgent of whoever holds most, of these the newest, as long as that is more than the tenant of
        `sequence` would hold.
        """
        blocks = self.block_manager
        would_hold = blocks.held[sequence.tenant] + num_missing
        if would_hold > self._part(blocks.num_blocks, sequence.tenant):
            return None
        leaving: list[Sequence] = []
        lacking = num_missing + self._reserve(sequence) - blocks.num_free_blocks
        if len(self.running) >= self.max_num_seqs:
            few = self._num_running[sequence.tenant] + 1
            holders = [one for one in self.running if self._num_running[one.tenant] > few and self._gives_way(one)]
            if not holders:
                return None
            leaving.append(_newest(holders, self._num_running))
            lacking -= blocks.num_private(leaving[0])
        if lacking <= 0:
            return leaving

        held = {tenant: number for tenant, number in blocks.held.items() if tenant != sequence.tenant}
        others: dict[str, list[Sequence]] = {tenant: [] for tenant in held}
        for one in self.running:
            if one not in leaving and one.tenant in held and self._gives_way(one):
                others[one.tenant].append(one)
        for line in others.values():
            line.sort(key=lambda one: one.priority)  # the last one leaves first
        while lacking > 0:
            most = max(held, key=held.__getitem__, default="")
            if not held or held[most] <= would_hold:
                return None
            if not others[most]:
                del held[most]
                continue
            leaving.append(others[most].pop())
            freed = blocks.num_private(leaving[-1])
            held[most] -= freed
            lacking -= freed
        return leaving

    def _reserve(self, sequence: Sequence) -> int:
        """Blocks for all who run, and for this one, to grow by an eighth of its length, or their part of an eighth."""
        if not self.running:
            return 0
        num_seqs = len(self.running) + 1
        of_each = min(
            len(sequence) // (8 * self.block_manager.block_size), self.block_manager.num_blocks // (8 * num_seqs)
        )
        return num_seqs * max(1, of_each)

    # Decoding

    def _schedule_decodes(self, is_shared: bool) -> None:
        num_tokens = self.max_num_batched_tokens - sum(one.num_tokens for one in self._batch.values())
        decoding = [
            one
            for one in self.running
            if one.num_uncomputed_tokens == 1
            and one not in self._batch
            and not one.is_held_up
            and not one.will_end(self.max_model_len)
        ]
        if len(decoding) > num_tokens or is_shared:
            decoding = self._longest_unserved(decoding, num_tokens, self.shared_budget if is_shared else None)
        for sequence in decoding:
            self.looking_at = sequence
            if sequence.block_table and self._grow(sequence):
                self._batch[sequence] = ScheduledSequence(sequence, sequence.num_computed_tokens, 1)
                sequence.last_step = self._num_steps

    def _longest_unserved(self, decoding: list[Sequence], num_tokens: int, budget: int | None) -> list[Sequence]:
        """As many as may be served, in their order: first those of whom got least in this step, of these the one that
        has waited longest for a token."""
        costs = {sequence: self.cost.decode(len(sequence)) for sequence in decoding}
        if len(decoding) <= num_tokens and (budget is None or sum(costs.values()) <= budget):
            return decoding
        lines: dict[str, deque[Sequence]] = {}
        for sequence in sorted(decoding, key=lambda one: one.last_step):
            lines.setdefault(sequence.tenant, deque()).append(sequence)
        turns = [(0, line[0].last_step, name) for name, line in lines.items()]  # what each got in this step comes first
        heapify(turns)
        chosen: set[Sequence] = set()
        spent = 0
        while turns and len(chosen) < num_tokens:
            got, _, name = turns[0]
            line = lines[name]
            cost = costs[line[0]]
            if chosen and budget is not None and spent + cost > budget:
                break
            chosen.add(line.popleft())
            spent += cost
            if line:
                heapreplace(turns, (got + cost, line[0].last_step, name))
            else:
                heappop(turns)
        return [sequence for sequence in decoding if sequence in chosen]

    def _grow(self, sequence: Sequence) -> bool:
        """Give it the block for its last token, if need be another's. False when it gave its own back for others."""
        while not self.block_manager.grow(sequence, len(sequence)):
            holders = list(filter(self._gives_way, self.running)) or self.running
            newest = _newest(holders, self.block_manager.held)
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.num_computed_tokens = 0
        self._note_waiting(sequence)
        self.waiting.push_preempted(sequence)
        self.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._num_running[sequence.tenant] -= 1
        if not self._num_running[sequence.tenant]:
            del self._num_running[sequence.tenant]
        self.block_manager.free(sequence)
        if sequence is self._kept:
            self._kept = None
        self._batch.pop(sequence, None)
        self._no_longer_in_progress(sequence, self.waiting.line_of(sequence))


def _newest(running: list[Sequence], held: Counter[str]) -> Sequence:
    """Of the tenant that holds most, and of its least urgent. Of two that hold as much, the tenant of the newest."""
    tenant = max(reversed(running), key=lambda sequence: held[sequence.tenant]).tenant
    of_tenant = (sequence for sequence in reversed(running) if sequence.tenant == tenant)
    return max(of_tenant, key=lambda sequence: sequence.priority)
