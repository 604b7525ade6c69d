"""A coordinator's sequences, by hand: a step of one second, whatever is in it."""

from __future__ import annotations

from cluster.config import EngineConfig
from cluster.simulation.fleet.coordinator import Coordinator, Sequence
from cluster.simulation.fleet.trace import Arrival


def run(coordinator: Coordinator, *arrivals: Arrival, timeout_s: float = 1e9) -> list[Sequence]:
    """Until all have ended, a step taking one second."""
    sequences = [Sequence(arrival, number) for number, arrival in enumerate(arrivals)]
    coming = list(sequences)
    now = 0.0
    while any(one.state == "waiting" for one in sequences):
        seconds = coordinator.next_s()
        moments = ([now + seconds] if seconds is not None else []) + [one.arrival.at_s for one in coming[:1]]
        assert moments, "somebody is forgotten"
        now = min(*moments, now + 1.0)  # the fleet looks once a second
        coordinator.settle(now)
        if coming and coming[0].arrival.at_s <= now:
            coordinator.take(coming.pop(0))
        coordinator.advance(timeout_s)
        coordinator.plan(1.0, coordinator.work().chunk)
    assert coordinator.present == 0
    assert abs(coordinator.kv_used) < 1e-6, "nothing is left in the cache"
    return sequences


def test_a_prompt_takes_its_chunks_and_an_answer_a_step_for_each_token() -> None:
    coordinator = Coordinator(EngineConfig(max_num_batched_tokens=2048), 10**6)
    [one] = run(coordinator, Arrival(0.0, 5000, 11))
    assert one.first_token_s == 3.0, "5,000 tokens in chunks of 2,048"
    assert one.finished_s == 13.0, "and ten more tokens"


def test_beside_who_decodes_prompts_have_a_quarter_of_a_step() -> None:
    coordinator = Coordinator(EngineConfig(max_num_batched_tokens=2048), 10**6)
    first, second = run(coordinator, Arrival(0.0, 100, 1001), Arrival(10.0, 1024, 2))
    assert first.first_token_s == 1.0
    assert second.first_token_s == 12.0, "two chunks of 512"
    assert (first.finished_s, second.finished_s) == (1001.0, 13.0)


def test_a_full_batch_and_a_full_cache_keep_others_waiting() -> None:
    batch = Coordinator(EngineConfig(max_num_seqs=1), 10**6)
    first, second = run(batch, Arrival(0.0, 10, 100), Arrival(1.0, 10, 100))
    assert (first.finished_s, second.first_token_s) == (100.0, 101.0)
    cache = Coordinator(EngineConfig(), 1500)
    first, second = run(cache, Arrival(0.0, 1000, 100), Arrival(1.0, 1000, 10))
    assert second.first_token_s > first.finished_s


def test_where_the_cache_is_full_after_all_the_newest_is_computed_again() -> None:
    coordinator = Coordinator(EngineConfig(), 1000)
    first, second = run(coordinator, Arrival(0.0, 400, 500), Arrival(0.5, 400, 500))
    assert second.had > 0, "it gave way"
    assert first.finished_s < 520
    assert second.finished_s > first.finished_s
    assert {first.state, second.state} == {"finished"}


def test_what_the_deadline_ends_is_failed() -> None:
    coordinator = Coordinator(EngineConfig(max_num_seqs=1), 10**6)
    first, second, third = run(
        coordinator, Arrival(0.0, 10, 100), Arrival(1.0, 10, 12), Arrival(2.0, 10, 100), timeout_s=109.0
    )
    assert [one.state for one in (first, second, third)] == ["finished", "failed", "failed"]
    assert third.first_token_s == 0.0, "it was not begun after its deadline"


def test_the_cache_that_is_used_is_what_sequences_hold() -> None:
    coordinator = Coordinator(EngineConfig(), 10**6)
    one = Sequence(Arrival(0.0, 300, 100), 0)
    coordinator.take(one)
    coordinator.advance(1e9)
    assert coordinator.kv_used == 300
    coordinator.plan(1.0, coordinator.work().chunk)
    coordinator.settle(1.0)
    coordinator.advance(1e9)
    coordinator.plan(1.0, coordinator.work().chunk)
    coordinator.settle(51.0)
    assert coordinator.kv_used == 350
    assert coordinator.work().context == 350
    assert coordinator.used_fraction == 1 / 64


def test_who_ends_gives_back_what_it_held_while_others_go_on() -> None:
    coordinator = Coordinator(EngineConfig(), 10**6)
    coordinator.take(Sequence(Arrival(0.0, 500, 101), 0))
    for now in range(25):
        coordinator.settle(float(now))
        if now == 10:
            coordinator.take(Sequence(Arrival(10.0, 300, 6), 1))
        coordinator.advance(1e9)
        coordinator.plan(1.0, coordinator.work().chunk)
    assert coordinator.running == 1
    assert coordinator.kv_used == 523, "its prompt, and a token a step after that"
