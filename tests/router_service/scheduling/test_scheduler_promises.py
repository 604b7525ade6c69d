"""The scheduler's promises, by simulation: random arrivals, lengths, tenants, departures, budgets and scarce blocks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from router_service.scheduling.block_manager import NULL_BLOCK, BlockManager
from router_service.scheduling.scheduler import RETRY_STEPS, SPARE, Scheduler
from router_service.scheduling.sequence import Sequence
from router_service.scheduling.step_cost import StepCost
from tests.router_service.requests import make_sequence


@dataclass
class Simulation:
    """A scheduler whose model always samples token 7, and what has to hold at every step of it."""

    scheduler: Scheduler
    step: int = 0
    num_scheduled: int = 0
    most_tenants: int = 1
    finished: list[Sequence] = field(default_factory=list)
    served: dict[Sequence, int] = field(default_factory=dict)  # the last step in which a running one went on
    longest_wait: Counter[str] = field(default_factory=Counter)  # of those who run: by "token" and "prompt"
    unfair: Counter[str] = field(default_factory=Counter)  # for so many steps a tenant has got less than it might

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            scheduler = self.scheduler
            self.step += 1
            num_preemptions = scheduler.num_preemptions
            batch = scheduler.schedule()
            if not batch:
                gave_way = scheduler.num_preemptions > num_preemptions  # the only one that the budget was for
                assert gave_way or not (scheduler.running or scheduler.waiting)
            assert sum(one.num_tokens for one in batch) <= scheduler.max_num_batched_tokens
            assert len({one.sequence for one in batch}) == len(batch)
            for one in batch:
                assert one.sequence in scheduler.running
                assert one.start == one.sequence.num_computed_tokens
                assert 0 < one.num_tokens <= one.sequence.num_uncomputed_tokens
                assert len(one.sequence.block_table) * scheduler.block_manager.block_size >= one.start + one.num_tokens
            self._check_waits({one.sequence for one in batch})
            self._check_shares()
            scheduler.update(batch, [7] * sum(one.samples for one in batch))
            self._check_blocks()
            self.num_scheduled += sum(one.num_tokens for one in batch)
            self.finished += [one.sequence for one in batch if one.sequence.finish_reason is not None]

    def run_to_the_end(self, at_most: int) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.run()
            assert self.step < at_most, "it comes to an end"
        assert self.scheduler.block_manager.num_used_blocks == 0
        assert not self.scheduler.block_manager.held

    def _check_waits(self, batch: set[Sequence]) -> None:
        """Every running sequence gets a token, or more of its prompt computed, at least every so many steps."""
        scheduler = self.scheduler
        running = set(scheduler.running)
        self.served = {one: step for one, step in self.served.items() if one in running}
        self.most_tenants = max(
            self.most_tenants, len({one.tenant for one in running} | set(scheduler.waiting.tenants()))
        )
        budget, num_seqs, tenants = scheduler.max_num_batched_tokens, scheduler.max_num_seqs, self.most_tenants
        longest = {"token": num_seqs * (2 if budget == 1 else 1), "prompt": 2 * tenants * (2 if budget < 4 else 1)}
        for one in running:
            waited = self.step - self.served.setdefault(one, self.step)
            kind = "token" if one.num_uncomputed_tokens == 1 else "prompt"
            assert waited <= longest[kind], (kind, waited, longest)
            self.longest_wait[kind] = max(self.longest_wait[kind], waited)
            if one in batch:
                self.served[one] = self.step
        lines = Counter(scheduler.waiting.line_of(one) for one in running - batch if one.num_uncomputed_tokens > 1)
        assert all(number == 1 for number in lines.values()), "one prompt of a line at a time"

    def _check_shares(self) -> None:
        """Nobody waits for long where another holds more of slots and blocks than the waiting one would."""
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        slots = Counter(one.tenant for one in scheduler.running)
        keeping = [one for one in scheduler.running if not scheduler._gives_way(one)]
        slots_given = slots.keys() - {one.tenant for one in keeping}  # for certain
        kept = Counter(one.tenant for one in keeping for _ in one.block_table)
        reserve = blocks.num_blocks // SPARE + scheduler.max_num_seqs + 1
        for tenant in {*self.unfair, *scheduler.waiting.tenants()}:
            deprived = False
            for line in ((tenant, False), (tenant, True)):
                head = scheduler.waiting.head(line)
                if head is None or line in scheduler._in_progress:  # their own prompt comes before
                    continue
                needs = -(-len(head) // blocks.block_size)
                would_hold = blocks.held[tenant] + needs
                given_way = sum(
                    max(0, held - max(would_hold, kept[other]))
                    for other, held in blocks.held.items()
                    if other != tenant
                )
                most_slots = max((slots[other] for other in slots_given), default=0)
                has_slot = len(scheduler.running) < scheduler.max_num_seqs or most_slots > slots[tenant] + 1
                has_blocks = blocks.num_free_blocks + given_way >= needs + reserve
                is_bounded = would_hold > blocks.num_blocks - blocks.num_blocks // SPARE
                is_bounded |= slots[tenant] >= scheduler.max_num_seqs - scheduler.max_num_seqs // SPARE
                deprived |= has_slot and has_blocks and not is_bounded and scheduler._may_pass(head)
            self.unfair[tenant] = self.unfair[tenant] + 1 if deprived else 0
            assert self.unfair[tenant] <= self._longest_unfair(), (tenant, self.unfair)

    def _longest_unfair(self) -> int:
        return (RETRY_STEPS + 4 * self.most_tenants) * (2 if self.scheduler.max_num_batched_tokens < 4 else 1)

    def _check_blocks(self) -> None:
        """Every block is free or held, and every reference is one in a table."""
        blocks = self.scheduler.block_manager
        held = Counter(block for one in self.scheduler.running for block in one.block_table if block != NULL_BLOCK)
        numbers = range(1, blocks.num_blocks + 1)
        assert {number: blocks._references[number] for number in numbers} == {
            number: held[number] for number in numbers
        }
        assert set(blocks._free) == {number for number in numbers if not held[number]}
        by_tenant = Counter(
            tenant
            for tenant, _ in {
                (one.tenant, block)
                for one in self.scheduler.running
                for block in one.block_table
                if block != NULL_BLOCK
            }
        )
        assert blocks.held == by_tenant
        assert all(not one.block_table for one in self.scheduler.waiting)


def simulation(
    *, num_blocks=64, block_size=4, max_num_seqs=8, budget=64, attention_context=2**40, window=None, prefix_caching=True
) -> Simulation:
    return Simulation(
        Scheduler(
            BlockManager(num_blocks, block_size, prefix_caching=prefix_caching),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=num_blocks * block_size,
            eos_token_ids=frozenset({2}),
            cost=StepCost(attention_context),
            sliding_window=window,
        )
    )


SIZES = {
    "seed": st.integers(0, 2**32),
    "max_num_seqs": st.sampled_from([1, 2, 3, 5, 8, 16]),
    "budget": st.sampled_from([1, 2, 3, 4, 7, 16, 64, 256, 1024]),
    "num_blocks": st.sampled_from([8, 20, 64, 200]),
    "num_tenants": st.integers(1, 5),
    "attention_context": st.sampled_from([1, 10, 100, 2**40]),
    "window": st.sampled_from([None, None, 3, 24]),
    "prefix_caching": st.booleans(),
}
unshrunk = settings(deadline=None, phases=[Phase.explicit, Phase.generate])  # a smaller seed is no simpler one


@settings(unshrunk, max_examples=6)
@given(**SIZES)
def test_whatever_comes(**sizes):
    whatever_comes(steps=40, **sizes)


@pytest.mark.long
@settings(unshrunk, max_examples=60)
@given(**SIZES)
def test_whatever_comes_for_longer(**sizes):
    whatever_comes(steps=300, **sizes)


def whatever_comes(*, steps, seed, num_tenants, num_blocks, **sizes):
    drawn = random.Random(seed)
    run = simulation(num_blocks=num_blocks, **sizes)
    longest = min(num_blocks * 4, 20 * sizes["budget"])
    present: list[Sequence] = []
    every = drawn.choice([1, 3, 10])
    for _ in range(steps):
        if drawn.randrange(every) == 0:
            length = drawn.choice([drawn.randint(1, 8), drawn.randint(1, longest // 2), drawn.randint(1, longest - 1)])
            alphabet = drawn.choice([2, 1000])
            tokens = [drawn.randrange(alphabet) + 10 for _ in range(length)]
            tenant = f"tenant {drawn.randrange(num_tenants)}"
            for _ in range(drawn.choice([1, 1, 1, 6])):  # a prompt, or its n choices
                one = make_sequence(tokens, max_tokens=drawn.randint(1, 60), cache_salt=tenant)
                run.add(one)
                present.append(one)
        if present and drawn.randrange(20) == 0:
            run.scheduler.remove(present.pop(drawn.randrange(len(present))))
        present = [one for one in present if one.finish_reason is None]
        run.run()
    run.run_to_the_end(at_most=100_000)
    assert all(one.finish_reason == "length" for one in present)


@pytest.mark.parametrize("num_tenants", [1, 3])
@pytest.mark.parametrize("num_blocks", [80, 256])
def test_little_is_computed_again(num_tenants, num_blocks):
    """Nothing is cached, and the blocks are enough for one sequence in ten: seen are 0.5 to 2.3 tokens computed again
    for each that was generated, and half as much again where no blocks are kept for those who run to grow."""
    drawn = random.Random(num_blocks)
    run = simulation(num_blocks=num_blocks, max_num_seqs=16, budget=256, prefix_caching=False)
    sequences = [
        make_sequence(
            [10] * drawn.randint(1, 60), max_tokens=drawn.randint(1, 200), cache_salt=str(drawn.randrange(num_tenants))
        )
        for _ in range(60)
    ]
    run.add(*sequences)
    run.run_to_the_end(at_most=20_000)
    num_computed_again = run.num_scheduled - sum(len(sequence) - 1 for sequence in sequences)
    assert run.scheduler.num_preemptions > 0
    assert num_computed_again <= 3 * sum(sequence.num_output_tokens for sequence in sequences)


@pytest.mark.parametrize("same_tenant", [True, False])
def test_a_short_prompt_behind_long_ones_gets_its_token_soon(same_tenant):
    """Within two steps and those that its share of the budget takes, whatever the long ones do."""
    for arrival in range(1, 12):
        run = simulation(num_blocks=2000, max_num_seqs=8, budget=256, attention_context=1000, prefix_caching=False)
        run.add(*(make_sequence([number] * 2_000, max_tokens=5) for number in range(3)))
        run.run(arrival)
        short = make_sequence(range(60), max_tokens=2, cache_salt="" if same_tenant else "other")
        run.add(short)
        run.run(2)
        assert short.num_output_tokens >= 1
