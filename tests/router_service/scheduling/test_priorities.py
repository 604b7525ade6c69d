"""`priority`: the lower is served earlier among the requests of one tenant, and means nothing to any other."""

import random

import pytest

from tests.router_service.requests import make_sequence
from tests.router_service.scheduling.test_scheduler import make_scheduler, run


def finished(scheduler, sequences, most=5000):
    """The step in which each has ended."""
    ended = {}
    for step in range(most):
        if len(ended) == len(sequences):
            return [ended[one] for one in sequences]
        run(scheduler)
        for one in sequences:
            if one.finish_reason is not None:
                ended.setdefault(one, step)
    raise AssertionError("it comes to an end")


@pytest.mark.parametrize("lengths", [(4, 4, 4), (40, 40, 40), (4, 40, 4), (40, 4, 40)], ids=str)
def test_the_urgent_are_served_first_whatever_their_length(lengths):
    """Long and short prompts take turns; a more urgent one goes before both."""
    scheduler = make_scheduler(num_blocks=200, max_num_seqs=1, budget=16)
    sequences = [make_sequence(range(n), priority=p, max_tokens=2) for n, p in zip(lengths, (7, 0, -7), strict=True)]
    for sequence in sequences:
        scheduler.add(sequence)
    ends = finished(scheduler, sequences)
    assert ends == sorted(ends, reverse=True)


def test_an_urgent_prompt_overtakes_one_that_is_computed_in_part():
    scheduler = make_scheduler(num_blocks=200, budget=16)
    long, urgent = make_sequence(range(160), priority=1, max_tokens=2), make_sequence(range(100), max_tokens=2)
    scheduler.add(long)
    run(scheduler, 2)
    assert long.num_computed_tokens == 32
    scheduler.add(urgent)
    assert run(scheduler) == [(urgent, 0, 16)]
    run(scheduler, 6)
    assert urgent.num_output_tokens == 1
    assert run(scheduler)[-1][0] is long, "it goes on where it was"
    assert long.num_computed_tokens > 32
    assert finished(scheduler, [long, urgent])


def test_of_one_tenant_the_least_urgent_gives_its_blocks_back():
    scheduler = make_scheduler(num_blocks=6, block_size=4, budget=64)
    kept, gone = make_sequence(range(8), max_tokens=9), make_sequence(range(8), priority=3, max_tokens=9)
    scheduler.add(gone)
    run(scheduler)
    scheduler.add(kept)
    for _ in range(8):
        run(scheduler)
    assert scheduler.num_preemptions
    assert kept in scheduler.running or kept.finish_reason
    assert list(scheduler.waiting) == [gone], "though it came first"


@pytest.mark.parametrize("priority", [-1000, 0, 1000])
def test_of_two_tenants_that_hold_as_much_the_newest_gives_way_whatever_its_priority(priority):
    """Who said a low number kept its blocks at the other's cost."""
    scheduler = make_scheduler(num_blocks=8, block_size=4, budget=64)
    first = make_sequence(range(11), cache_salt="a", max_tokens=20)
    second = make_sequence(range(11), cache_salt="b", priority=priority, max_tokens=20)
    for one in (first, second):
        scheduler.add(one)
        run(scheduler)
    while not scheduler.num_preemptions:
        run(scheduler)
    assert scheduler.running == [first]


@pytest.mark.parametrize("priority", [-1000, 0, 1000])
def test_to_others_a_priority_means_nothing(priority):
    """Whatever a tenant says of all that it sends, each step is the same."""
    steps = []
    for theirs in (0, priority):
        scheduler = make_scheduler(num_blocks=60, max_num_seqs=4, budget=24)
        chance = random.Random(5)
        sequences = {}
        log = []
        for step in range(400):
            for tenant in ("a", "a", "b"):
                if chance.random() < 0.15:
                    prompt = range(chance.randrange(1, 60))
                    mine = theirs if tenant == "a" else 0
                    one = make_sequence(prompt, cache_salt=tenant, priority=mine, max_tokens=chance.randrange(1, 9))
                    sequences[one] = len(sequences)
                    scheduler.add(one)
            log.append((step, [(sequences[one], start, number) for one, start, number in run(scheduler)]))
        steps.append(log)
    assert steps[0] == steps[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_flood_of_urgent_requests_starves_no_other_tenant(seed):
    """The other's requests come to their end in about the time that they take beside a flood without priorities."""
    ends = []
    for is_urgent in (False, True):
        chance = random.Random(seed)
        scheduler = make_scheduler(num_blocks=80, max_num_seqs=4, budget=24)
        flood = [
            make_sequence(
                range(chance.randrange(1, 60)),
                cache_salt="flood",
                priority=-chance.randrange(10) if is_urgent else 0,
                max_tokens=8,
            )
            for _ in range(60)
        ]
        mine = [make_sequence(range(10), cache_salt="mine", priority=9, max_tokens=8) for _ in range(4)]
        for one in (*flood, *mine):
            scheduler.add(one)
        ends.append(max(finished(scheduler, mine)))
    assert ends[1] <= 1.5 * ends[0] + 10
    assert ends[1] < 120, "of the hundreds of steps that the flood takes"


def test_a_long_prompt_that_its_own_tenant_overtakes_holds_up_no_other():
    """Blocks stayed free for it that its tenant's urgent requests never let it take: the other tenant got half."""
    scheduler = make_scheduler(num_blocks=60, block_size=4, max_num_seqs=8, budget=64)
    theirs = []
    for step in range(600):
        if step % 3 == 0:
            scheduler.add(make_sequence(range(20), cache_salt="a", max_tokens=12))
        if step == 20:
            scheduler.add(make_sequence(range(190), cache_salt="a", priority=1, max_tokens=2))
        while sum(one.finish_reason is None for one in theirs) < 4:
            theirs.append(make_sequence(range(20), cache_salt="b", max_tokens=12))
            scheduler.add(theirs[-1])
        run(scheduler)
    assert sum(one.finish_reason is not None for one in theirs) > 170, "190 where the long prompt is as urgent"
