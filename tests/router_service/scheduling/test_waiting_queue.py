"""Lines of the queue, and who is refused at a bound."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fairness import is_refused
from router_service.scheduling.waiting_queue import WaitingQueue
from tests.router_service.requests import make_sequence

LONG = 8


def test_each_line_is_served_in_order_of_arrival_whatever_stands_in_the_others():
    queue = WaitingQueue(longest_short=LONG)
    sequences = [
        make_sequence(range(length), cache_salt=tenant) for length in (1, LONG, LONG + 1, 99) for tenant in ("a", "b")
    ]
    for sequence in sequences:
        queue.push(sequence)
    assert queue.tenants() == ["a", "b"]
    assert queue.counts() == {"a": 4, "b": 4}
    for tenant in ("a", "b"):
        for is_long in (False, True):
            for length in (LONG + 1, 99) if is_long else (1, LONG):
                head = queue.head((tenant, is_long))
                assert (head.tenant, len(head)) == (tenant, length)
                queue.remove(head)
            assert queue.head((tenant, is_long)) is None
    assert not queue


def test_a_preempted_one_goes_before_those_of_its_line():
    queue = WaitingQueue(longest_short=LONG)
    queue.push(make_sequence([1], cache_salt="a"))
    preempted = make_sequence([1, 2], cache_salt="a")
    queue.push_preempted(preempted)
    assert queue.head(("a", False)) is preempted
    assert queue.head(("b", False)) is None


def test_one_that_does_not_wait_cannot_be_removed():
    queue = WaitingQueue(longest_short=LONG)
    queue.push(make_sequence([1], cache_salt="a"))
    for tenant in ("a", "b"):
        stranger = make_sequence([1], cache_salt=tenant)
        assert stranger not in queue
        with pytest.raises(ValueError):
            queue.remove(stranger)
    assert len(queue) == 1


def test_a_bound_refuses_those_who_hold_most():
    assert not is_refused({}, "a", 4)
    assert not is_refused({"a": 3}, "a", 4)
    assert is_refused({"a": 4}, "a", 4), "one alone may hold all, and no more"
    assert not is_refused({"a": 4}, "b", 4)
    assert not is_refused({"a": 4, "b": 1}, "b", 4)
    assert is_refused({"a": 4, "b": 2}, "b", 4)
    assert is_refused({"a": 4, "b": 2}, "a", 4)
    assert not is_refused({"a": 4, "b": 0}, "c", 4)


@given(st.integers(1, 40), st.lists(st.integers(0, 9), max_size=300))
def test_what_is_held_stays_bounded(bound, arrivals):
    held = Counter()
    for tenant in arrivals:
        if not is_refused(held, str(tenant), bound):
            held[str(tenant)] += 1
        elif held.total() < bound:
            raise AssertionError("refused below the bound")
    assert held.total() <= sum(max(1, bound // n) for n in range(1, 11))


def test_in_a_line_the_lowest_priority_goes_first_and_of_one_priority_the_first_to_come():
    queue = WaitingQueue(longest_short=LONG)
    came = [(0, "a"), (5, "b"), (-5, "c"), (0, "d"), (-5, "e"), (5, "f")]
    sequences = {name: make_sequence([1], priority=priority) for priority, name in came}
    for sequence in sequences.values():
        queue.push(sequence)
    preempted = make_sequence([1], priority=0)
    queue.push_preempted(preempted)
    gone = []
    while queue:
        gone.append(queue.head(("", False)))
        queue.remove(gone[-1])
    assert gone == [sequences["c"], sequences["e"], preempted, *(sequences[name] for name in "adbf")]


def test_a_more_urgent_one_displaces_the_last_of_the_least_urgent_that_has_not_begun():
    queue = WaitingQueue(longest_short=LONG)
    begun = make_sequence([1], priority=9, cache_salt="a")
    begun.was_admitted = True
    resumed = make_sequence([1], priority=9, cache_salt="a", output=[7])
    first, second = (make_sequence([1], priority=5, cache_salt="a") for _ in range(2))
    first.arrived_at, second.arrived_at = 1.0, 2.0
    sibling = make_sequence([1], priority=9, cache_salt="a", num_siblings=1)
    others = make_sequence([1], priority=9, cache_salt="b")
    for sequence in (
        begun,
        resumed,
        sibling,
        second,
        first,
        others,
        make_sequence(range(99), priority=3, cache_salt="a"),
    ):
        queue.push(sequence)
    assert queue.displaced_by(0, "a") is second
    assert queue.displaced_by(4, "a") is second
    assert queue.displaced_by(5, "a") is None, "as urgent is not more urgent"
    assert queue.displaced_by(0, "c") is None
