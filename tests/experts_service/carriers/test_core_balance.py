"""Threads that are asked at the same time get different cores, and their freedom back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from experts_service.carriers.core_balance import CoreBalance
from experts_service.carriers.dialer import LaneDialer
from experts_service.carriers.lane import LaneTransport
from experts_service.kernels.cost import READ_ROWS, cost
from experts_service.routing_table import Deployment, Replica
from experts_service.wire.address import LaneAddress
from router_service.dispatcher import Dispatcher
from tests.experts_service.lanes import FINGERPRINT, GROUPS, HERE, LONG_S, SECRET, Shards, ask, batch, expected, shards
from tests.waiting import wait_for

CORES = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@contextmanager
def sleeping_threads(count: int) -> Iterator[list[int]]:
    """Their ids."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield [thread.native_id or 0 for thread in threads]
    finally:
        end.set()
        for thread in threads:
            thread.join()


@contextmanager
def running_on(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("here", CORES[:2])
def test_the_last_one_asked_runs_where_we_wait_and_the_other_elsewhere(here: int) -> None:
    balance = CoreBalance(CORES[:2])
    with sleeping_threads(2) as (first, last), running_on(here):
        balance.spread([(first, 8), (last, 8)])
        assert os.sched_getaffinity(last) == {here}
        assert os.sched_getaffinity(first) == set(CORES[:2]) - {here}


def test_the_costliest_gets_a_core_of_its_own() -> None:
    here, other = CORES[:2]
    with sleeping_threads(4) as (a, b, c, last), running_on(here):
        CoreBalance(CORES[:2]).spread([(a, 8), (b, 40), (c, 16), (last, 8)])
        assert os.sched_getaffinity(b) == {other}
        assert all(os.sched_getaffinity(thread) == {here} for thread in (a, c, last))


def test_a_thread_that_ended_is_left_out() -> None:
    with sleeping_threads(1) as ended:
        pass
    balance = CoreBalance(CORES[:2])
    with sleeping_threads(1) as (last,):
        balance.spread([(ended[0], 8), (last, 8)])
        assert len(os.sched_getaffinity(last)) == 1
        balance.release()
        assert os.sched_getaffinity(last) == set(CORES[:2])


@pytest.mark.parametrize(
    ("num_cores", "num_shards", "needed"), [(1, 8, False), (2, 1, False), (2, 2, True), (2, 8, True), (16, 8, False)]
)
def test_needed_where_shards_and_coordinator_outnumber_the_cores(num_cores: int, num_shards: int, needed: bool) -> None:
    assert CoreBalance(range(num_cores)).is_needed(num_shards) is needed


def test_an_expert_costs_at_least_the_reading_of_its_weights() -> None:
    assert cost((1, 0, 100)) == READ_ROWS + 100


def test_a_transport_spreads_its_shards_and_lets_go_of_them() -> None:
    with shards() as running:
        transport, threads = _spread(running)
        placed = [os.sched_getaffinity(thread) for thread in threads]
        assert [len(cores) for cores in placed] == [1, 1]
        assert placed[0] != placed[1]

        running.start("1b", 1)  # two replicas of one group: whose thread will work is not known beforehand
        wait_for(lambda: _asked(transport) and os.sched_getaffinity(threads[0]) == set(CORES), LONG_S, "a free thread")


def test_a_shard_is_free_again_when_its_coordinator_leaves() -> None:
    with shards() as running:
        transport, threads = _spread(running)
        assert all(len(os.sched_getaffinity(thread)) == 1 for thread in threads)
        transport.close()
        wait_for(lambda: all(os.sched_getaffinity(thread) == set(CORES) for thread in threads), LONG_S, "free threads")


def _spread(running: Shards) -> tuple[LaneTransport, list[int]]:
    """A transport to one shard of either group, which has been asked, and the shards' threads."""
    running.start("0a", 0)
    running.start("1a", 1)
    transport = _spreading(running)
    assert _asked(transport)
    return transport, [running.servers[name].thread_id for name in ("0a", "1a")]


def _spreading(running: Shards) -> LaneTransport:
    def address(replica: Replica, timeout_s: float) -> LaneAddress:
        server = running.servers[replica.replica_id]
        return LaneAddress(str(server.path), "", 0, HERE, "first", server.thread_id)

    dialer = LaneDialer(address, secret=SECRET, fingerprint=FINGERPRINT, node_id=HERE)
    deployments = {group: Deployment("model", f"expert-{group}") for group in (0, 1)}
    transport = LaneTransport(deployments, running.table, dialer, timeout_s=LONG_S, cores=CoreBalance(CORES[:2]))
    running.transports.append(transport)
    return transport


def _asked(transport: LaneTransport) -> bool:
    """Dispatch twice: the first one makes the connections. Whether both answers are right."""
    rows, experts = batch(9)
    right, dispatcher = expected(rows, experts), Dispatcher(GROUPS, transport)
    return all(ask(dispatcher, rows, experts).equal(right) for _ in range(2))
