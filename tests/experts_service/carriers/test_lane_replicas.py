"""Several replicas of a group over lanes: rows are split over them, stragglers hedged, and neither changes a bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts_service.delivery.flight import split
from experts_service.delivery.replica_load import SPLIT_ROWS, ReplicaLoads
from experts_service.routing_table import Replica
from experts_service.transport import GroupRows
from router_service.dispatcher import Dispatcher
from tests.experts_service.lanes import (
    GROUPS,
    LONG_S,
    LocalMaths,
    Run,
    Shards,
    ask,
    batch,
    expected,
    maths,
    shards,
    wait_until_reached,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("usual_carrier")


def slow(experts: Sequence[int], seconds: Callable[[], float]) -> Run:
    """The same answers, later."""
    run = maths(experts)

    def run_late(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        time.sleep(seconds())
        return run(layer, rows, counts)

    return run_late


def test_a_straggler_is_hedged_then_avoided_and_asked_again_once_it_has_recovered() -> None:
    quick = threading.Event()
    with shards() as running:
        straggler = running.start("0a", 0, slow(GROUPS[0].experts, lambda: float(not quick.wait(LONG_S))))
        running.start("0b", 0)
        running.start("1a", 1)
        quick.set()
        transport = running.transport(timeout_s=90.0)
        dispatcher, local = Dispatcher(GROUPS, transport), Dispatcher(GROUPS, LocalMaths())
        rows, experts = batch(4)
        expected = ask(local, rows, experts)

        def run(times: int) -> float:
            longest = 0.0
            for _ in range(times):
                started = time.monotonic()
                assert torch.equal(ask(dispatcher, rows, experts), expected)
                longest = max(longest, time.monotonic() - started)
            return longest

        wait_until_reached(transport, 0, 2)
        run(400)
        usual = transport.latency[0].hedges
        assert usual <= 0.05 * 800 + 10, "at most every twentieth when nothing is slow"
        owed = straggler.stats().frames
        quick.clear()

        def is_hedged() -> bool:
            assert run(1) < 20, "the first answer counted, and before a third of the timeout"
            return transport.latency[0].hedges > usual

        wait_for(is_hedged, LONG_S, "the straggler to be asked")
        assert run(60) < 20
        assert transport.latency[1].hedges == 0, "there is no other to ask"
        quick.set()
        wait_for(lambda: straggler.stats().frames > owed, LONG_S, "the answer that the straggler owed")

        def is_asked_again() -> bool:
            before = straggler.stats().frames
            run(200)
            return straggler.stats().frames > before + 40

        wait_for(is_asked_again, 60, "an even share for the straggler")


def num_frames(running: Shards) -> int:
    return sum(server.stats().frames for server in running.servers.values())


def test_an_answer_that_is_there_is_read_before_anybody_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that came late to look for its answers took the shards for late, and asked others in vain."""
    overdue_s = 0.3
    for module in ("replica_load", "delivery"):
        monkeypatch.setattr(f"experts_service.delivery.{module}.OVERDUE_S", overdue_s)
    with shards() as running:
        for name, group in (("0a", 0), ("0b", 0), ("1a", 1)):
            running.start(name, group)
        transport = running.transport(timeout_s=30.0)
        dispatcher = Dispatcher(GROUPS, transport)
        rows, experts = batch(4)
        weights = torch.full(experts.shape, 0.5)
        for number in range(1, 4):
            dispatch = dispatcher.dispatch(1, rows, experts)
            wait_for(lambda num=2 * number: num_frames(running) == num, 60, "the shards to have computed")
            time.sleep(2 * overdue_s)  # a hundred times what an answer takes
            assert torch.equal(dispatcher.combine(dispatch, weights), expected(rows, experts))
        assert transport.latency[0].hedges == 0


def test_a_shard_that_was_stopped_owes_its_answers_and_is_left_alone_meanwhile() -> None:
    gate = threading.Event()
    with shards() as running:
        stopped = running.start("0a", 0, slow(GROUPS[0].experts, lambda: float(not gate.wait(LONG_S))))
        running.start("0b", 0)
        running.start("1a", 1)
        gate.set()
        dispatcher = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(4)
        for _ in range(100):
            ask(dispatcher, rows, experts)
        gate.clear()
        frames = stopped.stats().frames
        for _ in range(200):
            ask(dispatcher, rows, experts)
        assert stopped.stats().frames <= frames + 1
        gate.set()


def test_a_shard_that_was_stopped_before_its_speed_is_known_is_hedged_all_the_same() -> None:
    """What is usual takes some dispatches to learn; till then a stopped shard held steps for a third of the timeout."""
    gate = threading.Event()
    with shards() as running:
        running.start("0a", 0, slow(GROUPS[0].experts, lambda: float(not gate.wait(LONG_S))))
        running.start("0b", 0)
        running.start("1a", 1)
        dispatcher, local = Dispatcher(GROUPS, running.transport(timeout_s=90.0)), Dispatcher(GROUPS, LocalMaths())
        rows, experts = batch(4)
        started = time.monotonic()
        for _ in range(4):
            assert torch.equal(ask(dispatcher, rows, experts), ask(local, rows, experts))
        assert time.monotonic() - started < 20, "promised a second; a third of the timeout is 30"
        gate.set()


def test_many_rows_of_a_group_are_split_over_its_replicas() -> None:
    with shards() as running:
        servers = [running.start(name, 0) for name in ("0a", "0b", "0c")]
        running.start("1a", 1)
        transport = running.transport()
        dispatcher, local = Dispatcher(GROUPS, transport), Dispatcher(GROUPS, LocalMaths())
        rows, experts = batch(500)
        wait_until_reached(transport, 0, 3)
        assert torch.equal(ask(dispatcher, rows, experts), ask(local, rows, experts))
        assert min(server.stats().rows for server in servers) >= SPLIT_ROWS, "each had a third of the first rows"
        for _ in range(10):  # then by what a busy machine let it do
            assert torch.equal(ask(dispatcher, rows, experts), ask(local, rows, experts))


@pytest.mark.parametrize("slower_first", [False, True])
def test_replicas_of_unlike_tiers_share_many_rows_by_their_speed(slower_first: bool) -> None:
    """One on a GPU and one on a CPU, say. Each takes its own time for its share, which is no reason for a hedge."""

    def by_rows(row_s: float) -> Run:
        run = maths(GROUPS[0].experts)

        def run_late(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
            time.sleep(row_s * len(rows))
            return run(layer, rows, counts)

        return run_late

    with shards() as running:
        row_s = [0.4e-3, 0.1e-3] if slower_first else [0.1e-3, 0.4e-3]
        servers = [running.start(name, 0, by_rows(each)) for name, each in zip(("0a", "0b"), row_s, strict=True)]
        slower, fast = servers if slower_first else servers[::-1]
        running.start("1a", 1)
        transport = running.transport()
        dispatcher, local = Dispatcher(GROUPS, transport), Dispatcher(GROUPS, LocalMaths())
        rows, experts = batch(600)
        expected = ask(local, rows, experts)
        wait_until_reached(transport, 0, 2)

        def shared_by_speed() -> bool:
            """Most dispatches as four to one, as far as the machine lets sleepers wake, in one of several tries."""
            times, hedges = [], transport.latency[0].hedges
            for _ in range(20):
                before = fast.stats().rows, slower.stats().rows
                assert torch.equal(ask(dispatcher, rows, experts), expected)
                of_fast, of_slower = fast.stats().rows - before[0], slower.stats().rows - before[1]
                times.append(of_fast / of_slower if of_slower else float("inf"))
            return 1.5 < sorted(times)[10] < 12 and transport.latency[0].hedges - hedges <= 5

        for _ in range(8):  # to learn
            ask(dispatcher, rows, experts)
        wait_for(shared_by_speed, LONG_S, "a share for each by its speed")


@pytest.mark.usefixtures("unhedged")
def test_the_time_of_each_share_is_taken_when_its_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one asked first was waited for alone: where it was the slower one, the other seemed to be as slow."""
    monkeypatch.setattr("experts_service.carriers.link.WAIT_S", LONG_S)  # of who waits for one alone
    taken, seen = threading.Event(), []

    def after_the_other(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        seen.append(taken.wait(10))
        return maths(GROUPS[0].experts)(layer, rows, counts)

    with shards() as running:
        running.start("0a", 0, after_the_other)
        running.start("0b", 0)
        running.start("1a", 1)
        transport = running.transport()
        wait_until_reached(transport, 0, 2)
        answered = transport.deliveries.loads.answered

        def take(replica: str, *answer: Any) -> None:
            answered(replica, *answer)
            if replica == "0b":
                taken.set()

        monkeypatch.setattr(transport.deliveries.loads, "answered", take)
        rows, experts = batch(600)
        assert torch.equal(ask(Dispatcher(GROUPS, transport), rows, experts), expected(rows, experts))
    assert seen == [True]


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=6).filter(sum),
    st.lists(st.floats(1e-6, 1e-3) | st.none(), min_size=1, max_size=5),
)
def test_pieces_of_a_group_hold_its_rows_in_order(counts: list[int], row_s: list[float | None]) -> None:
    total, num_replicas, loads = sum(counts), len(row_s), ReplicaLoads()
    replicas = [Replica(str(index), "", "", 0, "") for index in range(num_replicas)]
    for replica, seconds in zip(replicas, row_s, strict=True):
        if seconds is not None:
            loads.answered(replica.replica_id, 0, SPLIT_ROWS, SPLIT_ROWS * seconds)
    part = GroupRows(0, np.arange(total), tuple(counts), torch.empty(total + 3, 1), 3)
    pieces = split(part, loads.shares(replicas, total))
    assert np.array_equal(np.concatenate([piece.row_indices for piece in pieces]), part.row_indices)
    assert [sum(of) for of in zip(*(piece.counts for piece in pieces), strict=True)] == counts
    at = part.start
    for piece in pieces:
        assert piece.start == at
        assert sum(piece.counts) == len(piece.row_indices) >= min(total, SPLIT_ROWS)
        at += len(piece.row_indices)
    assert len(pieces) <= num_replicas


def damaged(experts: Sequence[int], times: int) -> Run:
    """Answers NaN so often, then as it should."""
    run = maths(experts)
    left = [times]

    def run_damaged(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        left[0] -= 1
        answer = run(layer, rows, counts)
        return answer * float("nan") if left[0] >= 0 else answer

    return run_damaged


@pytest.mark.parametrize("times", [1, 10**6])
def test_an_answer_that_is_not_finite_is_asked_of_another_replica(times: int, device: str) -> None:
    with shards() as running:
        running.start("0a", 0, damaged(GROUPS[0].experts, times))
        running.start("0b", 0)
        running.start("1a", 1)
        dispatcher = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(4)
        for _ in range(10):
            assert torch.equal(ask(dispatcher, rows.to(device), experts.to(device)).cpu(), expected(rows, experts))


def test_rows_that_are_not_finite_in_every_replica_come_back_as_they_are() -> None:
    with shards() as running:
        for name in ("0a", "0b"):
            running.start(name, 0, damaged(GROUPS[0].experts, 10**6))
        running.start("1a", 1)
        dispatcher = Dispatcher(GROUPS, running.transport(timeout_s=60.0))
        rows, experts = batch(4)
        started = time.monotonic()
        assert not torch.isfinite(ask(dispatcher, rows, experts)).all()
        assert time.monotonic() - started < 20
