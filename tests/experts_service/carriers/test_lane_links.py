"""Dials that hang, fail or come back delay no dispatch that another replica can answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cluster.errors import ExpertUnavailable
from experts_service.carriers import links
from experts_service.carriers.dialer import Dialer, Dialled
from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.link import LinkLost
from experts_service.routing_table import Deployment, Replica
from router_service.dispatcher import Dispatcher
from tests.experts_service.lanes import GROUPS, LONG_S, Shards, ask, batch, expected, maths, shards, wait_until_reached
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("usual_carrier")


SHORT_S = 10.0  # where a dispatch that waited for a dial or an answer would take twice as long


class Network:
    """Dials as usual, but nothing comes back from replicas that are cut off, and those that refuse say so at once."""

    def __init__(self, dialer: Dialer) -> None:
        self.cut: set[str] = set()
        self.refusing: set[str] = set()
        self.dials: list[str] = []
        self._dialer = dialer

    def __call__(self, replica: Replica, timeout_s: float) -> Dialled:
        self.dials.append(replica.replica_id)
        if replica.replica_id in self.refusing:
            raise LinkLost("it cannot be reached: refused")
        deadline = time.monotonic() + timeout_s
        while replica.replica_id in self.cut:
            if time.monotonic() >= deadline:
                raise LinkLost("it cannot be reached: timed out")
            time.sleep(0.01)
        return self._dialer(replica, timeout_s)


def over(running: Shards, timeout_s: float = LONG_S) -> tuple[Network, LaneTransport]:
    network = Network(running.transport(timeout_s).routes._links._dialer)
    deployments = {group: Deployment("model", f"expert-{group}") for group in (0, 1)}
    transport = LaneTransport(deployments, running.table, network, timeout_s=timeout_s)
    running.transports.append(transport)
    return network, transport


def longest_s(dispatcher: Dispatcher, times: int) -> float:
    longest = 0.0
    rows, experts = batch(9)
    right = expected(rows, experts)
    for _ in range(times):
        started = time.monotonic()
        assert torch.equal(ask(dispatcher, rows, experts), right)
        longest = max(longest, time.monotonic() - started)
    return longest


def lose(running: Shards, name: str) -> None:
    """What the kernel does with the connections of a process that was killed."""
    for connection in list(running.servers[name]._connections.values()):
        connection.channel.shutdown(socket.SHUT_RDWR)


def test_a_replica_takes_rows_once_it_is_connected_and_no_dispatch_waits_for_that() -> None:
    with shards() as running:
        running.start("0a", 0)
        running.start("1a", 1)
        network, transport = over(running)
        dispatcher = Dispatcher(GROUPS, transport)
        longest_s(dispatcher, 1)
        network.cut.add("0b")
        late = running.start("0b", 0)
        assert longest_s(dispatcher, 50) < SHORT_S
        assert "0b" in network.dials
        assert late.stats().frames == 0
        network.cut.clear()
        wait_for(lambda: longest_s(dispatcher, 20) < SHORT_S and late.stats().frames > 5, 60, "rows for the new one")


def test_a_lost_replica_is_dialled_behind_the_dispatches_and_trusted_again() -> None:
    with shards() as running:
        for name, group in (("0a", 0), ("0b", 0), ("1a", 1)):
            running.start(name, group)
        network, transport = over(running)
        dispatcher = Dispatcher(GROUPS, transport)
        wait_until_reached(transport, 0, 2)
        network.cut.add("0a")
        lose(running, "0a")
        assert longest_s(dispatcher, 200) < SHORT_S, "as long as a dial may take"
        deployment = transport.deployments[0]
        assert [r.replica_id for r in running.table.replicas(deployment) if r.suspected] == ["0a"]
        frames = running.servers["0a"].stats().frames
        network.cut.clear()

        def is_back() -> bool:
            return longest_s(dispatcher, 20) < SHORT_S and running.servers["0a"].stats().frames > frames

        wait_for(is_back, 60, "its return")
        assert not any(r.suspected for r in running.table.replicas(deployment))


@pytest.mark.usefixtures("unhedged", "impatient")
def test_a_silent_replica_is_given_up_and_comes_back_when_it_answers_a_dial() -> None:
    asleep = threading.Event()
    awake = threading.Event()
    awake.set()

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        if not awake.is_set():
            asleep.set()
            awake.wait(2 * LONG_S)
        return maths(GROUPS[0].experts)(layer, rows, counts)

    with shards() as running:
        silent = running.start("0a", 0, run)
        running.start("1a", 1)
        _, transport = over(running)
        dispatcher = Dispatcher(GROUPS, transport)
        longest_s(dispatcher, 1)
        awake.clear()
        running.start("0b", 0)
        assert longest_s(dispatcher, 50) < SHORT_S, "it is given up after a second"
        assert asleep.is_set()
        deployment = transport.deployments[0]
        assert [r.replica_id for r in running.table.replicas(deployment) if r.suspected] == ["0a"]
        frames = silent.stats().frames
        awake.set()
        wait_for(lambda: longest_s(dispatcher, 20) < SHORT_S and silent.stats().frames > frames + 5, 60, "its return")


def test_a_replica_that_announces_itself_is_dialled_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "FIRST_PAUSE_S", 1000.0)
    with shards() as running:
        for name, group in (("0a", 0), ("0b", 0), ("1a", 1)):
            running.start(name, group)
        network, transport = over(running)
        network.refusing.add("0a")
        dispatcher = Dispatcher(GROUPS, transport)
        longest_s(dispatcher, 1)
        wait_for(lambda: transport.routes._links.refusal("0a"), LONG_S, "its only dial to fail")
        network.refusing.clear()
        deployment = transport.deployments[0]
        running.table.suspect(deployment, "0a", running.table.epoch)
        running.table.trust(deployment, "0a")  # as its ExpertService has it told when the shard was restarted
        wait_until_reached(transport, 0, 2)
        longest_s(dispatcher, 5)
        assert running.servers["0a"].stats().frames > 0


def test_all_replicas_of_a_group_are_dialled_at_once_and_the_first_one_serves() -> None:
    with shards() as running:
        for name, group in (("0a", 0), ("0b", 0), ("1a", 1)):
            running.start(name, group)
        network, transport = over(running)
        network.cut.add("0a")
        assert longest_s(Dispatcher(GROUPS, transport), 20) < SHORT_S


def test_a_group_that_cannot_be_reached_fails_at_the_deadline_with_the_reason() -> None:
    with shards() as running:
        for name, group in (("0a", 0), ("1a", 1)):
            running.start(name, group)
        network, transport = over(running, timeout_s=0.5)
        network.cut.add("0a")
        started = time.monotonic()
        with pytest.raises(ExpertUnavailable, match=r"group 0 did not answer .* \(it "):
            ask(Dispatcher(GROUPS, transport), *batch(9))
        assert time.monotonic() - started < 20


def test_a_replica_that_left_is_dialled_no_more() -> None:
    before = set(threading.enumerate())
    with shards() as running:
        for name, group in (("0a", 0), ("0b", 0), ("1a", 1)):
            running.start(name, group)
        network, transport = over(running)
        network.refusing.add("0b")
        dispatcher = Dispatcher(GROUPS, transport)
        longest_s(dispatcher, 3)
        running.servers.pop("0b").close()
        running.publish()

        def dials() -> bool:
            return any(thread.name == "lane-dial" for thread in set(threading.enumerate()) - before)

        wait_for(lambda: not dials(), LONG_S, "the end of the dials")
        longest_s(dispatcher, 3)
