"""Tenants take turns, and none of a sequence is lost."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fairness import is_refused
from router_service.waiting_queue import WaitingQueue
from tests.router_service.requests import make_sequence


def queue_of(*tenants):
    queue = WaitingQueue()
    sequences = [make_sequence([1], cache_salt=tenant) for tenant in tenants]
    for sequence in sequences:
        queue.push(sequence)
    return queue, sequences


def drain(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_one_tenant_is_served_in_order_of_arrival():
    queue, sequences = queue_of("", "", "")
    assert drain(queue) == sequences


def test_a_flood_of_one_does_not_hold_up_another():
    queue, sequences = queue_of(*["flood"] * 100, "late")
    late = sequences[-1]
    order = drain(queue)
    assert order.index(late) == 1
    assert [sequence for sequence in order if sequence is not late] == sequences[:-1]


def test_a_preempted_one_goes_before_all():
    queue, _ = queue_of("a", "b")
    preempted = make_sequence([1], cache_salt="b")
    queue.push_preempted(preempted)
    assert queue.peek() is preempted
    assert queue.counts() == {"a": 1, "b": 2}
    assert queue.pop() is preempted


def test_one_that_does_not_wait_cannot_be_removed():
    queue, _ = queue_of("a")
    for tenant in ("a", "b"):
        stranger = make_sequence([1], cache_salt=tenant)
        assert stranger not in queue
        with pytest.raises(ValueError):
            queue.remove(stranger)
    assert len(queue) == 1


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "preempt"]), st.integers(0, 3)), max_size=80))
def test_nothing_is_lost_and_nobody_waits_longer_than_one_turn_of_each(actions):
    queue, waiting = WaitingQueue(), []
    skipped = Counter()  # how often others were served while a tenant waited, since it was last served
    for action, number in actions:
        tenant = f"tenant-{number}"
        if action in ("push", "preempt"):
            sequence = make_sequence([1], cache_salt=tenant)
            (queue.push if action == "push" else queue.push_preempted)(sequence)
            waiting.append((sequence, action))
        elif waiting and action == "remove":
            sequence, _ = waiting.pop(number % len(waiting))
            queue.remove(sequence)
        elif waiting:
            sequence = queue.pop()
            [entry] = [entry for entry in waiting if entry[0] is sequence]
            waiting.remove(entry)
            tenants = {one.request.cache_salt for one, kind in waiting if kind == "push"}
            if entry[1] == "push":
                for other in tenants - {sequence.request.cache_salt}:
                    skipped[other] += 1
                skipped[sequence.request.cache_salt] = 0
            skipped = Counter({name: count for name, count in skipped.items() if name in tenants})
            assert max(skipped.values(), default=0) <= 3
        assert len(queue) == len(waiting)
        assert all(sequence in queue for sequence, _ in waiting)


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
