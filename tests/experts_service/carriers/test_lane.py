"""Rows over lanes, on real sockets: the bits of local experts, and what happens when a shard fails in every way."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from cluster.errors import ExpertUnavailable
from experts_service.carriers.link import NOBODY, WAIT_S, LaneAttempt, Link, LinkLost
from experts_service.delivery.delivery import ANSWERED, FAILED, POSTED
from experts_service.routing_table import Deployment
from experts_service.shard.batch import run_as_one
from experts_service.shard.server import MAX_UNPROVEN, LaneServer
from experts_service.wire.address import LaneAddress, connect
from experts_service.wire.frame import ANSWER, HEAD_BYTES, FrameError, RowsFormat, answer_head, refusal_head
from router_service.dispatcher import Dispatcher
from tests.experts_service.lanes import (
    ELSEWHERE,
    FINGERPRINT,
    GROUPS,
    HERE,
    HIDDEN,
    LONG_S,
    Shards,
    ask,
    batch,
    expected,
    maths,
    shards,
    wait_until_reached,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("carrier")

UNIX_AND_TCP = pytest.mark.parametrize("node", [HERE, ELSEWHERE], ids=["unix", "tcp"])


class Gate:
    """Maths that waits until the test lets it go."""

    def __init__(self, group: int) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self._maths = maths(GROUPS[group].experts)

    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        self.calls.append((layer, tuple(counts)))
        self.entered.set()
        assert self.open.wait(LONG_S)
        return self._maths(layer, rows, counts)


def both(running: Shards) -> Dispatcher:
    for group in (0, 1):
        running.start(f"{group}a", group)
    return Dispatcher(GROUPS, running.transport())


@UNIX_AND_TCP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lane_gives_the_bits_of_local_experts(node: str, dtype: torch.dtype, device: str) -> None:
    with shards(node, dtype) as running:
        remote = both(running)
        for num_rows in (1, 2, 17, 300, 9000):  # the last is more than sockets and first buffers hold
            rows, experts = batch(num_rows, dtype)
            for layer in range(3):
                answer = ask(remote, rows.to(device), experts.to(device), layer).cpu()
                assert torch.equal(answer, expected(rows, experts, layer)), num_rows
        assert sorted(running.dialled) == ["0a", "1a"], "connections persist"


def test_rows_that_no_frame_may_hold_travel_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all experts of a token in one group a long prompt may have more: each step with it failed."""
    for module in ("wire.frame", "carriers.lane"):
        monkeypatch.setattr(f"experts_service.{module}.MAX_PAYLOAD_BYTES", 17 * HIDDEN * 4)
    with shards() as running:
        remote = both(running)
        for num_rows in (17, 18, 300):
            rows, experts = batch(num_rows)
            experts[:] = torch.tensor([0, 1])  # one of each group
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts)), num_rows


@UNIX_AND_TCP
def test_a_batch_without_rows_asks_nobody(node: str) -> None:
    with shards(node) as running:
        remote = both(running)
        assert ask(remote, torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64)).shape == (0, HIDDEN)
        assert not running.dialled


def test_dispatches_under_way_combine_in_any_order() -> None:
    with shards() as running:
        remote = both(running)
        batches = [batch(n, seed=n) for n in (3, 4, 2000)]
        weights = [torch.full(experts.shape, 0.5) for _, experts in batches]
        flights = [remote.dispatch(1, rows, experts) for rows, experts in batches]
        for i in (1, 2, 0):
            assert torch.equal(remote.combine(flights[i], weights[i]), expected(*batches[i]))


def test_frames_of_two_coordinators_run_as_one_batch_and_equal_separate_ones() -> None:
    gate = Gate(0)
    with shards() as running:
        running.start("0a", 0, gate)
        running.start("1a", 1)
        coordinators = [Dispatcher(GROUPS, running.transport()) for _ in range(3)]
        batches = [batch(n, seed=n) for n in (2, 5, 30)]
        gate.open.set()
        for coordinator, one in zip(coordinators, batches, strict=True):
            ask(coordinator, *one)
        gate.open.clear()
        gate.entered.clear()
        before = running.servers["0a"].stats()
        flights = []
        for coordinator, (rows, experts) in zip(coordinators, batches, strict=True):
            flights.append(coordinator.dispatch(1, rows, experts))
            assert gate.entered.wait(LONG_S)  # the first occupies the shard, so that the other two arrive together
        time.sleep(0.05)
        gate.open.set()
        for coordinator, flight, (rows, experts) in zip(coordinators, flights, batches, strict=True):
            weights = torch.full(experts.shape, 0.5)
            assert torch.equal(coordinator.combine(flight, weights), expected(rows, experts))
        stats = running.servers["0a"].stats()
        assert (stats.frames - before.frames, stats.batches - before.batches) == (3, 2)
        assert stats.rows == 2 * before.rows


def test_merged_rows_stand_together_by_expert() -> None:
    seen: list[tuple[list[float], tuple[int, ...]]] = []

    def run(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
        seen.append((rows[:, 0].tolist(), tuple(counts)))
        return rows + 100

    a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    for places in ((None, None), (torch.zeros(3, 1), torch.zeros(3, 1))):
        answers = run_as_one(run, 0, [(a, (2, 1), places[0]), (b, (1, 2), places[1])])
        assert seen.pop() == ([1, 2, 10, 3, 20, 30], (3, 3))
        assert [answer.flatten().tolist() for answer in answers] == [[101, 102, 103], [110, 120, 130]]
        if places[0] is not None:
            assert [answer is place for answer, place in zip(answers, places, strict=True)] == [True, True]


@pytest.mark.parametrize("in_place", [True, False])
def test_an_answer_is_where_it_belongs_whether_or_not_the_maths_writes_it_there(in_place: bool) -> None:
    def run(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
        return answers.copy_(rows + 100) if in_place and answers is not None else rows + 100

    place = torch.zeros(2, 1)
    for counts in ((2, 0), (1, 1)):
        (answer,) = run_as_one(run, 0, [(torch.tensor([[1.0], [2.0]]), counts, place.zero_())])
        assert answer is place
        assert place.flatten().tolist() == [101, 102]


def suspected_after_a_loss(running: Shards, settled: Callable[[], bool] = lambda: True) -> list[bool]:
    """Of two replicas, trusted ones first, once one has lost its connection over rows, and all is `settled`.

    The other one ran them.
    """
    gate = Gate(0)
    running.start("0a", 0, gate)
    running.start("1a", 1)
    remote = Dispatcher(GROUPS, running.transport(timeout_s=90.0))
    rows, experts = batch(9)
    flight = remote.dispatch(1, rows, experts)
    assert gate.entered.wait(LONG_S)
    running.start("0b", 0)
    started = time.monotonic()
    for connection in list(running.servers["0a"]._connections.values()):
        connection.channel.shutdown(socket.SHUT_RDWR)  # what the kernel does for a process that was killed
    assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
    assert time.monotonic() - started < 20.0, "an EOF is seen at once, silence after a third of the timeout"
    wait_for(settled, LONG_S, "all to be told")
    suspected = [r.suspected for r in running.table.replicas(remote._transport.deployments[0])]  # type: ignore[attr-defined]
    gate.open.set()
    return suspected


@UNIX_AND_TCP
def test_rows_go_to_another_replica_when_a_shard_dies(node: str) -> None:
    with shards(node) as running:
        assert suspected_after_a_loss(running) == [False, True]


def test_what_fails_at_once_on_a_new_connection_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not where the thread that had dialled told the table after rows were under way."""
    with shards() as running:
        renew, told = running.table.renew, set()

        def late(deployment: Deployment, replica_id: str) -> None:
            time.sleep(0.3)
            renew(deployment, replica_id)
            told.add(replica_id)

        def all_are_told_of() -> bool:
            return told == {"0a", "0b", "1a"}

        monkeypatch.setattr(running.table, "renew", late)
        assert suspected_after_a_loss(running, all_are_told_of) == [False, True]


def test_whoever_hears_of_a_new_connection_can_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table told of it before it was there. Whoever looked in between found none, and looked no more: there was no
    other news, and the group's only replica was asked nothing."""
    with shards() as running:
        renew = running.table.renew

        def renew_and_linger(deployment: Deployment, replica_id: str) -> None:
            renew(deployment, replica_id)
            time.sleep(0.3)

        running.start("0a", 0)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport(timeout_s=20.0))
        rows, experts = batch(9)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        monkeypatch.setattr(running.table, "renew", renew_and_linger)
        for connection in list(running.servers["0a"]._connections.values()):
            connection.channel.shutdown(socket.SHUT_RDWR)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))


def test_a_shard_that_restarts_elsewhere_is_dialled_at_its_new_address() -> None:
    with shards() as running:
        remote = both(running)
        rows, experts = batch(9)
        ask(remote, rows, experts)
        running.servers["0a"].close()
        flight = remote.dispatch(1, rows, experts)
        running.start("0a", 0)
        assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
        assert not any(r.suspected for r in running.table.replicas(remote._transport.deployments[0]))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("unhedged", "impatient")
def test_a_silent_shard_is_left_for_another_and_its_late_answer_is_skipped() -> None:
    gate = Gate(0)
    with shards() as running:
        running.start("0a", 0, gate)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(9)
        flight = remote.dispatch(1, rows, experts)
        assert gate.entered.wait(LONG_S)
        running.start("0b", 0)
        assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
        running.servers["0b"].close()
        gate.open.set()  # now the answer of the first attempt comes, on a connection that is used again
        other_rows, other_experts = batch(9, seed=5)
        assert torch.equal(ask(remote, other_rows, other_experts), expected(other_rows, other_experts))


def test_a_group_gets_all_its_rows_while_another_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a socket had no room for waited until a group before had answered, or for a tenth of a second."""
    monkeypatch.setattr("experts_service.carriers.link.WAIT_S", 60.0)
    begun, seen = threading.Event(), []

    def first(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        seen.append(begun.wait(20))
        return maths(GROUPS[0].experts)(layer, rows, counts)

    def second(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        begun.set()
        return maths(GROUPS[1].experts)(layer, rows, counts)

    with shards() as running:
        running.start("0a", 0, first)
        running.start("1a", 1, second)
        rows, _ = batch(200_000)  # 6 MB, where a Unix socket holds 200 KB
        experts = torch.tensor(GROUPS[1].experts).repeat(len(rows), 1)
        experts[0] = torch.tensor(GROUPS[0].experts)
        answers = ask(Dispatcher(GROUPS, running.transport(timeout_s=30.0)), rows, experts)
    assert seen == [True], "the other group had its rows by then"
    assert torch.equal(answers, expected(rows, experts))


def test_the_deadline_of_a_dispatch_names_group_and_layer() -> None:
    gate = Gate(0)
    with shards() as running:
        running.start("0a", 0, gate)
        running.start("1a", 1)
        transport = running.transport(timeout_s=0.4)
        remote = Dispatcher(GROUPS, transport)
        started = time.monotonic()
        with pytest.raises(ExpertUnavailable, match=r"group 0 did not answer for layer 2 within 0\.4 s"):
            ask(remote, *batch(9), layer=2)
        assert 0.3 < time.monotonic() - started < 10
        transport.deliveries.timeout_s = 60.0
        gate.open.set()
        rows, experts = batch(4)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts)), "the connection is in step"


def test_no_work_is_done_for_rows_whose_deadline_has_passed() -> None:
    """Those of layers 1 and 2 are read together, and the first take longer than the second may wait."""
    gate = Gate(0)

    def slow_at_layer_1(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        time.sleep(0.5 if layer == 1 else 0.0)
        return gate(layer, rows, counts)

    with shards() as running:
        server = running.start("0a", 0, slow_at_layer_1)
        running.start("1a", 1)
        transport = running.transport()
        hurried = Dispatcher(GROUPS, transport)
        flights = [hurried.dispatch(0, *batch(9))]
        assert gate.entered.wait(LONG_S)
        flights.append(hurried.dispatch(1, *batch(9)))
        transport.deliveries.timeout_s = 0.3
        flights.append(hurried.dispatch(2, *batch(9)))
        gate.open.set()
        patient = Dispatcher(GROUPS, running.transport())
        ask(patient, *batch(9), layer=0)
        assert [layer for layer, _ in gate.calls] == [0, 1, 0]
        assert server.stats().late == 1
        for flight in flights:
            flight.close()


def test_a_dropped_dispatch_leaves_the_connection_in_step() -> None:
    with shards() as running:
        remote = both(running)
        for num_rows in (1, 40, 3000):
            remote.dispatch(1, *batch(num_rows, seed=7)).close()  # the step failed elsewhere: nobody waits for it
            rows, experts = batch(num_rows + 1)
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts))


@pytest.mark.parametrize("num_rows", [1, 40, 3000])
def test_a_frame_that_cannot_be_packed_leaves_what_was_sent_before_in_step(num_rows, monkeypatch) -> None:
    """The first group had its rows when the second one's frame failed: its answer is nobody's."""
    with shards() as running:
        remote = both(running)
        rows, experts = batch(num_rows)
        experts[:] = torch.tensor([0, 1])  # one of each group
        ask(remote, rows, experts)  # connected
        pack = RowsFormat.pack
        calls = []

        def failing(form: RowsFormat, *arguments: object) -> bytes:
            calls.append(form)
            if len(calls) == 2:
                raise FrameError("too many bytes")
            return pack(form, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(RowsFormat, "pack", failing)
        with pytest.raises(FrameError):
            remote.dispatch(1, rows, experts)
        for layer in (0, 1, 2):
            assert torch.equal(ask(remote, rows, experts, layer), expected(rows, experts, layer))
        transport = running.transports[0]
        assert [transport.routes.owed(name) for name in ("0a", "1a")] == [0, 0]


def test_an_error_of_the_maths_is_told_and_the_connection_lives() -> None:
    broken = True

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return maths(GROUPS[0].experts)(layer, rows, counts)

    with shards() as running:
        running.start("0a", 0, run)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(9)
        with pytest.raises(ExpertUnavailable, match="RuntimeError: out of memory"):
            ask(remote, rows, experts)
        broken = False
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert running.dialled.count("0a") == 1


def test_a_draining_shard_finishes_what_it_has_and_refuses_the_rest() -> None:
    gate = Gate(0)
    with shards() as running:
        running.start("0a", 0, gate)
        running.start("1a", 1)
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(9)
        first = remote.dispatch(1, rows, experts)
        assert gate.entered.wait(LONG_S)
        assert not running.servers["0a"].drain(0.05), "one batch is in flight"
        second = remote.dispatch(1, rows, experts)
        running.start("0b", 0)
        gate.open.set()
        for flight in (first, second):
            assert torch.equal(remote.combine(flight, torch.full(experts.shape, 0.5)), expected(rows, experts))
        assert running.servers["0a"].drain(60.0)
        assert len(gate.calls) == 1
        assert running.servers["0b"].stats().frames == 1


@pytest.mark.parametrize(
    ("secret", "fingerprint", "reason"),
    [(b"x" * 32, FINGERPRINT, "another lane secret"), (b"s" * 32, "e" * 64, "another checkpoint")],
)
def test_a_stranger_gets_no_lane(
    secret: bytes, fingerprint: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with shards() as running, caplog.at_level(logging.WARNING):
        running.start("0a", 0)
        running.start("1a", 1)
        transport = running.transport(secret=secret, fingerprint=fingerprint)
        for group in transport.deployments:
            transport.routes.connect(group)  # returns when it is refused
        transport.deliveries.timeout_s = 0.3
        with pytest.raises(ExpertUnavailable, match="no handshake"):
            ask(Dispatcher(GROUPS, transport), *batch(3))
        assert reason in caplog.text
        assert sum(server.stats().refused for server in running.servers.values()) >= 1


def test_replicas_of_two_tiers_serve_one_group_and_each_shows_its_own_tiers_format(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that rounds otherwise than its tier was to is refused, and the other tier has its rows."""
    rounded, tier = "0" * 64, "expert-0-tier1"
    with shards() as running, caplog.at_level(logging.WARNING):
        running.tiers = {"0b": tier, "0c": tier}
        running.start("0a", 0)
        running.start("0b", 0, fingerprint=rounded)
        running.start("0c", 0, fingerprint=FINGERPRINT)
        running.start("1a", 1)
        transport = running.transport(of_tiers={tier: rounded})
        remote = Dispatcher(GROUPS, transport)
        rows, experts = batch(9)
        wait_until_reached(transport, 0, 2)
        wait_for(lambda: "no lane to shard-0c" in caplog.text, LONG_S, "the third one to be refused")
        for _ in range(8):
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        served = {name: server.stats().frames for name, server in running.servers.items()}
        assert served["0a"] > 0
        assert served["0b"] > 0
        assert served["0c"] == 0
        running.servers["0b"].close()
        for _ in range(4):
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert running.servers["0a"].stats().frames > served["0a"]


def test_slow_and_stalled_peers_delay_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts_service.wire.handshake.TIMEOUT_S", 60.0)  # of the mute one
    with shards() as running:
        for group in (0, 1):
            running.start(f"{group}a", group)
        remote = Dispatcher(GROUPS, running.transport(timeout_s=60.0))
        rows, experts = batch(9)
        ask(remote, rows, experts)
        server = running.servers["0a"]
        transport = running.transport()
        replica = running.table.replicas(transport.deployments[0])[0]
        form = RowsFormat(2)
        stalled = transport.routes._links._dialer(replica, 5.0).channel  # sends half a frame, then nothing
        stalled.sendall(form.pack(torch.float32, 1, 0, 0, 1, 50, HIDDEN, 1000, (50, 0)) + b"half")
        deaf = transport.routes._links._dialer(replica, 5.0).channel  # asks for much and reads nothing
        deaf.settimeout(0.2)
        big = form.pack(torch.float32, 1, 0, 0, 1, 50_000, HIDDEN, 60_000, (50_000, 0)) + bytes(50_000 * HIDDEN * 4)
        with pytest.raises(TimeoutError):
            deaf.sendall(100 * big)
        mute = connect(LaneAddress(str(server.path), "", 0, HERE, ""), HERE, 1.0)  # never introduces itself
        started = time.monotonic()
        for _ in range(20):
            assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        assert time.monotonic() - started < 20.0, "a third of what any of them may take"
        for peer in (stalled, deaf, mute):
            peer.close()
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))


@pytest.mark.parametrize("node", [HERE, ELSEWHERE])
def test_peers_that_say_nothing_keep_no_coordinator_out(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While 64 connections were open that nobody used, a shard refused every new coordinator, for five seconds each."""
    monkeypatch.setattr("experts_service.wire.handshake.TIMEOUT_S", 60.0)
    rows, experts = batch(5)
    with shards(node) as running:
        servers = [running.start("0a", 0), running.start("1a", 1)]
        first = Dispatcher(GROUPS, running.transport())
        assert torch.equal(ask(first, rows, experts), expected(rows, experts))
        addresses = [LaneAddress(str(server.path), "127.0.0.1", server.port, node, "") for server in servers]
        with ExitStack() as silent:
            peers = [silent.enter_context(connect(addresses[i % 2], HERE, 1.0)) for i in range(2 * 2 * MAX_UNPROVEN)]
            started = time.monotonic()
            second = Dispatcher(GROUPS, running.transport(timeout_s=60.0))
            assert torch.equal(ask(second, rows, experts), expected(rows, experts))
            assert time.monotonic() - started < 30, "no silent peer was waited for"
            assert torch.equal(ask(first, rows, experts), expected(rows, experts)), "it has proved itself"
            assert peers[0].recv(1) == b"", "the oldest had to go"
            peers[-1].setblocking(False)
            with pytest.raises(BlockingIOError):
                peers[-1].recv(1)
        assert all(server.stats().refused >= MAX_UNPROVEN for server in servers)


def test_a_peer_that_leaves_takes_its_frames_with_it() -> None:
    gate = Gate(0)
    with shards() as running:
        server = running.start("0a", 0, gate)
        running.start("1a", 1)
        leaver = Dispatcher(GROUPS, running.transport())
        for layer in (0, 1, 2):
            leaver.dispatch(layer, *batch(9))
        assert gate.entered.wait(LONG_S)
        leaver.close()
        gate.open.set()
        stayer = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(9)
        assert torch.equal(ask(stayer, rows, experts), expected(rows, experts))
        assert server.stats().connections == 1


def test_the_server_waits_without_burning_a_core() -> None:
    with shards() as running:
        ask(both(running), *batch(9))
        clocks = [time.pthread_getcpuclockid(server._thread.ident or 0) for server in running.servers.values()]
        before = sum(map(time.clock_gettime, clocks))
        time.sleep(0.5)
        assert sum(map(time.clock_gettime, clocks)) - before < 0.1


def test_a_server_that_is_closed_again_wakes_nobody_else() -> None:
    """It wrote to whoever had its descriptor's number by then."""
    with shards() as running, open(os.eventfd(0, os.EFD_NONBLOCK), "rb", buffering=0) as others:
        server = running.start("0a", 0)
        number = server._wake.fileno()
        server.close()
        os.dup2(others.fileno(), number)
        server.close()
        os.close(number)
        assert others.read(8) is None


def test_closing_a_server_leaves_no_socket_behind() -> None:
    with shards() as running:
        server: LaneServer = running.start("0a", 0)
        assert server.path.exists()
        assert len(str(server.path)) <= 107
        assert server.path.parent.stat().st_mode & 0o777 == 0o700
        server.close()
        assert not server.path.exists()
        with pytest.raises(ExpertUnavailable):
            server.stats()


def test_a_link_skips_stale_answers_and_moves_what_it_read_too_early() -> None:
    """An answer of another epoch or attempt, even with our request id, never reaches the combine buffer."""
    ours, shard = socket.socketpair()
    link = Link(ours)
    form = RowsFormat(1)

    def head(request_id: int, epoch: int, attempt: int) -> bytes:
        return form.pack(torch.float32, request_id, epoch, 0, attempt, 1, 2, 1000, (1,))

    asks = [LaneAttempt(NOBODY, 5, n, memoryview(bytearray(8))) for n in (1, 2)]
    for one in asks:
        asked = head(one.request_id, 5, 2)
        one.expected = answer_head(asked)
        link.send(one, asked, memoryview(bytes(8)))
    stale = [head(1, 4, 2), head(1, 5, 1), head(9, 5, 2)]
    data = b"".join(answer_head(h) + b"OLDANSWR" for h in stale)
    data += answer_head(head(2, 5, 2)) + b"second__" + answer_head(head(1, 5, 2)) + b"first___"
    with shard:
        for start in range(0, len(data), 7):  # in pieces that fit no border
            shard.sendall(data[start : start + 7])
            while asks[0].state is not ANSWERED:
                try:
                    link.receive(asks[0], socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
    assert [one.state for one in asks] == [ANSWERED, ANSWERED]
    assert [bytes(one.memory) for one in asks] == [b"first___", b"second__"]
    assert not link.outstanding
    link.close()


def asked_link(num_bytes: int = 8) -> tuple[Link, LaneAttempt, bytes, socket.socket]:
    """A link that was asked for one row, the head that it sent, and the shard's end."""
    ours, shard = socket.socketpair()
    link = Link(ours)
    one = LaneAttempt(NOBODY, 0, 1, memoryview(bytearray(num_bytes)))
    asked = RowsFormat(1).pack(torch.float32, 1, 0, 0, 1, 1, num_bytes // 4, 1000, (1,))
    one.expected = answer_head(asked)
    link.send(one, asked, memoryview(bytes(num_bytes)))
    return link, one, asked, shard


def test_a_link_looks_for_an_answer_until_it_may_sleep() -> None:
    link, one, _, shard = asked_link()
    with shard:
        started = time.monotonic()
        with pytest.raises(BlockingIOError):
            link.wait(one, started + 0.05)
        assert time.monotonic() - started >= 0.05 + WAIT_S
        later = threading.Timer(0.05, shard.sendall, [one.expected + b"answered"])
        later.start()
        link.wait(one, time.monotonic() + 60)
        later.join()
    assert one.state is ANSWERED
    assert bytes(one.memory) == b"answered"
    link.close()


def test_an_answer_that_comes_byte_by_byte_keeps_nobody_from_the_clock() -> None:
    """A dispatch was hedged, and found its deadline passed, only once a slow network had been silent for a while."""
    link, one, _, shard = asked_link(num_bytes=1000)
    done = threading.Event()

    def trickle() -> None:
        for byte in one.expected + b"a" * 1000:
            if done.wait(WAIT_S / 4):
                return
            shard.sendall(bytes([byte]))

    carrier = Shards().transport().deliveries.carrier
    with shard:
        slow = threading.Thread(target=trickle)
        slow.start()
        started = time.monotonic()
        carrier.poll([one], started + 2 * WAIT_S, 0.0, each=False)
        seconds = time.monotonic() - started
        done.set()
        slow.join()
    assert one.state is POSTED
    assert seconds < 100 * WAIT_S, "all of it would take 250 times that"
    link.close()


def test_answers_are_not_slept_for_where_the_last_ones_came_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, experts = torch.ones(1, HIDDEN), torch.tensor([GROUPS[0].experts])
    with shards() as running:
        running.start("0a", 0)
        transport = running.transport()
        seen = []
        for soon_s in (60.0, 1e-9, 60.0):
            monkeypatch.setattr("experts_service.delivery.flight.SOON_S", soon_s)
            assert torch.equal(ask(Dispatcher(GROUPS, transport), rows, experts), expected(rows, experts))
            seen.append(transport.deliveries.answers_soon)
    assert seen == [True, False, True]


def test_a_link_closes_on_what_is_no_reply() -> None:
    link, one, asked, shard = asked_link()
    with shard:
        shard.sendall(refusal_head(asked, ANSWER, 0, 16) + bytes(16))
        with pytest.raises(LinkLost):
            link.receive(one)
    assert link.lost
    assert one.state is FAILED
    assert HEAD_BYTES == 44
