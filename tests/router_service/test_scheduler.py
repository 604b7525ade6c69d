"""The scheduler without a model: a fake one that samples token 7 for ever."""

import pytest

from router_service.block_manager import BlockManager
from router_service.scheduler import Scheduler
from tests.router_service.requests import make_sequence


def make_scheduler(*, num_blocks=32, block_size=4, max_num_seqs=8, budget=16, prefix_caching=False):
    return Scheduler(
        BlockManager(num_blocks, block_size, prefix_caching=prefix_caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=num_blocks * block_size,
        eos_token_ids=frozenset({2}),
    )


def run(scheduler, steps=1):
    for _ in range(steps):
        batch = scheduler.schedule()
        scheduler.update(batch, [7 for scheduled in batch if scheduled.samples])
    return [(scheduled.sequence, scheduled.start, scheduled.num_tokens) for scheduled in batch]


def test_a_long_prompt_is_chunked_under_the_budget_and_samples_once():
    scheduler = make_scheduler(budget=16)
    sequence = make_sequence(range(40))
    scheduler.add(sequence)
    assert [run(scheduler)[0][1:] for _ in range(3)] == [(0, 16), (16, 16), (32, 8)]
    assert sequence.num_output_tokens == 1
    assert run(scheduler) == [(sequence, 40, 1)]


def test_decoding_goes_before_new_prompts():
    scheduler = make_scheduler(budget=8)
    first, second = make_sequence(range(4)), make_sequence(range(20))
    scheduler.add(first)
    run(scheduler)
    scheduler.add(second)
    assert run(scheduler) == [(first, 4, 1), (second, 0, 7)]


def test_no_more_sequences_than_allowed():
    scheduler = make_scheduler(max_num_seqs=2)
    for _ in range(3):
        scheduler.add(make_sequence([1], max_tokens=2))
    assert len(run(scheduler)) == 2
    assert len(run(scheduler)) == 2
    assert len(run(scheduler)) == 1


def test_the_last_one_gives_way_when_blocks_run_out_and_comes_back():
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=64)
    first, second = make_sequence(range(8), max_tokens=6), make_sequence(range(8), max_tokens=6)
    scheduler.add(first)
    scheduler.add(second)
    assert len(run(scheduler)) == 2  # two blocks each, and one token more than fits
    assert run(scheduler) == [(first, 8, 1)]
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting.peek() is second
    assert second.num_output_tokens == 1  # what was sampled stays
    for _ in range(10):
        run_batch = scheduler.schedule()
        scheduler.update(run_batch, [7] * sum(s.samples for s in run_batch))
    assert first.finish_reason == second.finish_reason == "length"
    assert first.num_output_tokens == second.num_output_tokens == 6
    assert scheduler.block_manager.num_used_blocks == 0


def test_nothing_is_left_behind_by_remove():
    scheduler = make_scheduler()
    running, waiting = make_sequence(range(4)), make_sequence(range(4))
    scheduler.add(running)
    run(scheduler)
    scheduler.add(waiting)
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.block_manager.num_used_blocks == 0


def test_a_cached_prefix_is_not_computed_again():
    scheduler = make_scheduler(prefix_caching=True, budget=64)
    scheduler.add(make_sequence(range(12), max_tokens=1))
    run(scheduler)
    sequence = make_sequence([*range(12), 50, 51])
    scheduler.add(sequence)
    assert run(scheduler) == [(sequence, 12, 2)]
    assert sequence.num_cached_tokens == 12


@pytest.mark.parametrize(
    ("token", "fields", "reason"),
    [
        (2, {}, "stop"),
        (2, {"ignore_eos": True}, None),
        (2, {"min_tokens": 5}, None),
        (9, {"stop_token_ids": (9,)}, "stop"),
        (9, {}, None),
        (9, {"max_tokens": 1}, "length"),
        (2, {"max_tokens": 1}, "stop"),
    ],
)
def test_when_a_sequence_ends(token, fields, reason):
    scheduler = make_scheduler()
    sequence = make_sequence([1, 3], **fields)
    scheduler.add(sequence)
    scheduler.update(scheduler.schedule(), [token])
    assert sequence.finish_reason == reason
    assert sequence.stop_token_id == (token if reason == "stop" else None)
    assert len(scheduler.running) == (reason is None)


def test_the_context_ends_a_sequence():
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    sequence = make_sequence(range(6), max_tokens=100)
    scheduler.add(sequence)
    run(scheduler, steps=2)
    assert len(sequence) == 8
    assert sequence.finish_reason == "length"
