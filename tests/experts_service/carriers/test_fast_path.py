"""Dispatches of the usual kind, by compiled calls: the bits of ordinary ones, and what becomes of the unusual."""

from __future__ import annotations

import cProfile
import os
import pstats
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.telemetry.metrics import DispatchCounts
from experts_service.carriers import fast_path, memory
from experts_service.carriers.fast_path import FastFlight, FastPath
from experts_service.carriers.lane import LaneCarrier
from experts_service.carriers.link import NOBODY, NOTHING, LaneAttempt, Link, LinkLost
from experts_service.carriers.local import LocalTransport
from experts_service.delivery.delivery import ANSWERED, POSTED, Deliveries
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.matmul import load_kernels
from experts_service.kernels.experts import Experts
from experts_service.routing_table import RoutingTable
from experts_service.shard.server import LaneServer
from experts_service.transport import GroupRows
from experts_service.wire.frame import HEAD_BYTES, LaneShape, answer_head
from experts_service.wire.shared_memory import ANSWERED as ANSWERED_STATE
from experts_service.wire.shared_memory import LOOKED_AT, STATE_BYTES, SharedMemory, create
from router_service.dispatcher import Dispatcher
from tests.experts_service import lanes
from tests.experts_service.lanes import GROUPS, LONG_S, LocalMaths, Run, Shards, maths, shards, stopped_in_layer_2
from tests.waiting import wait_for

pytestmark = [pytest.mark.usefixtures("memory"), pytest.mark.skipif(not AVAILABLE, reason="nothing is compiled")]

WIDTH, LAYER, MOST_CALLS = 32, 1, 60
ROW_BYTES = 2 * WIDTH


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "HIDDEN", WIDTH)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is kept from its core for a second does not take its answers for late."""
    monkeypatch.setattr(fast_path, "OVERDUE_S", LONG_S)


@pytest.fixture
def running() -> Iterator[Shards]:
    with shards(dtype=torch.bfloat16) as started:
        yield started


def batch(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return lanes.batch(num_rows, torch.bfloat16, seed)


def combined(dispatcher: Dispatcher, dispatch: Any, num_rows: int) -> Tensor:
    weights = torch.rand(num_rows, 2, generator=torch.Generator().manual_seed(3))
    return dispatcher.combine(dispatch, weights)


def ask(dispatcher: Dispatcher, rows: Tensor, experts: Tensor, layer: int = LAYER) -> Tensor:
    return combined(dispatcher, dispatcher.dispatch(layer, rows, experts), len(rows))


def expected(rows: Tensor, experts: Tensor, layer: int = LAYER) -> Tensor:
    return ask(Dispatcher(GROUPS, LocalMaths()), rows, experts, layer)


def both(running: Shards) -> Dispatcher:
    """The same, connected."""
    remote = running.both()
    ask(remote, *batch(5))
    return remote


def none_has_slots(running: Shards) -> bool:
    return not any(len(link.memory.slots) or link.outstanding for link in running.links() if link.memory)


def test_bits_are_those_of_local_experts_and_nothing_is_copied(running: Shards) -> None:
    remote = both(running)
    for num_rows in (1, 2, 7, 64, 500):
        rows, experts = batch(num_rows, seed=num_rows)
        dispatch = remote.dispatch(LAYER, rows, experts)
        assert isinstance(dispatch.flight, FastFlight)
        dispatch.answers.fill_(7.0)
        assert torch.equal(combined(remote, dispatch, num_rows), expected(rows, experts)), num_rows
        assert (dispatch.answers == 7.0).all(), "they are added up where they lie"
        assert none_has_slots(running)
    assert all(server.stats().in_memory for server in running.servers.values())


def test_one_row_to_two_groups_takes_few_calls(running: Shards) -> None:
    remote = both(running)
    rows, experts = batch(1)[0], torch.tensor([[GROUPS[0].experts[0], GROUPS[1].experts[0]]])
    ask(remote, rows, experts)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(20):
        ask(remote, rows, experts)
    profiler.disable()
    entries: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    assert sum(calls for (file, _, _), (_, calls, *_) in entries.items() if file != "~") / 20 <= MOST_CALLS


def test_flights_may_be_waited_for_in_any_order(running: Shards) -> None:
    """Who is waited for first reads the head of another one's answer, and gives it to that one."""
    remote = both(running)
    batches = [batch(20, seed=seed) for seed in range(3)]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        flights = [remote.dispatch(LAYER, *one) for one in batches]
        for index in order:
            assert torch.equal(combined(remote, flights[index], 20), expected(*batches[index])), order
        assert none_has_slots(running)


def said_once(number: float) -> tuple[Run, list[int]]:
    """Maths of the first group with `number` in the second answer, and how many rows were run each time."""
    said: list[int] = []

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        answer = maths(GROUPS[0].experts)(layer, rows, counts)
        said.append(len(rows))
        if len(said) == 2:
            answer[-1, -1] = number
        return answer

    return run, said


def die_over_rows(running: Shards, opened: threading.Event) -> None:
    """The shard of the first group ends with the rows that it waits with, and comes back."""
    dying = running.servers["0a"]
    dying._stopping = True
    opened.set()
    dying.close()
    running.start("0a", 0)


def test_an_answer_that_is_not_finite_is_asked_for_again(running: Shards) -> None:
    run, said = said_once(torch.nan)
    running.start("0a", 0, run)
    remote = both(running)
    rows, experts = batch(9)
    assert len(said) == 1
    dispatch = remote.dispatch(LAYER, rows, experts)
    assert isinstance(dispatch.flight, FastFlight)
    assert torch.equal(combined(remote, dispatch, 9), expected(rows, experts))
    assert len(said) == 3
    assert none_has_slots(running)


def test_a_shard_that_dies_over_the_rows_is_asked_again_when_it_is_back(running: Shards) -> None:
    run, entered, opened = stopped_in_layer_2()
    running.start("0a", 0, run)
    remote = both(running)
    rows, experts = batch(40)
    dispatch = remote.dispatch(2, rows, experts)
    assert isinstance(dispatch.flight, FastFlight)
    assert entered.wait(LONG_S)
    die_over_rows(running, opened)
    assert torch.equal(combined(remote, dispatch, 40), expected(rows, experts, 2))
    assert none_has_slots(running)


def test_a_late_answer_keeps_its_slots_until_it_has_come(running: Shards) -> None:
    run, entered, opened = stopped_in_layer_2()
    running.start("0a", 0, run)
    remote = both(running)
    dropped = remote.dispatch(2, *batch(40, seed=1))
    assert entered.wait(LONG_S)
    dropped.close()
    memory = running.transports[0].routes._links._links["0a"].memory
    assert memory is not None
    assert len(memory.slots) == 1
    rows, experts = batch(40, seed=2)
    flight = remote.dispatch(1, rows, experts)
    assert len(memory.slots) == 2
    opened.set()
    assert torch.equal(combined(remote, flight, 40), expected(rows, experts))
    assert len(memory.slots) == 0


def test_heads_that_a_socket_has_no_room_for_are_sent_later(running: Shards) -> None:
    opened = threading.Event()

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert layer != 2 or opened.wait(LONG_S)
        return maths(GROUPS[0].experts)(layer, rows, counts)

    running.start("0a", 0, run)
    remote = both(running)
    for link in running.links():
        link.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    batches = [batch(2, seed=seed) for seed in range(50)]
    flights = [remote.dispatch(2, *one) for one in batches]
    assert any(link.unsent for link in running.links())
    opened.set()
    for flight, one in zip(flights, batches, strict=True):
        assert torch.equal(combined(remote, flight, 2), expected(*one, 2))
    assert none_has_slots(running)


def test_where_slots_are_short_nothing_is_sent_to_anybody(running: Shards) -> None:
    remote = both(running)
    memory = next(link.memory for link in running.links() if link.memory)
    assert memory is not None
    memory.slots.take(-1, 64)
    rows, experts = batch(40)
    dispatch = remote.dispatch(LAYER, rows, experts)
    assert not isinstance(dispatch.flight, FastFlight)
    assert torch.equal(combined(remote, dispatch, 40), expected(rows, experts))
    memory.slots.give_back(-1)
    assert none_has_slots(running)


def test_a_replica_that_left_while_it_owed_an_answer_is_let_go_of(running: Shards) -> None:
    """Its lane stayed open, with its memory, for as long as all dispatches were of the usual kind."""
    run, entered, opened = stopped_in_layer_2()
    leaving = running.start("0a", 0, run)
    remote = both(running)
    rows, experts = batch(40)
    owed = remote.dispatch(2, rows, experts)
    assert entered.wait(LONG_S)
    del running.servers["0a"]
    running.start("0b", 0)
    routes = running.transports[0].routes
    wait_for(lambda: [one.replica_id for one in routes.reachable(0)] == ["0b"], LONG_S, "the other replica")
    opened.set()
    assert torch.equal(combined(remote, owed, 40), expected(rows, experts, 2))
    dispatch = remote.dispatch(LAYER, rows, experts)
    assert isinstance(dispatch.flight, FastFlight)
    assert set(routes._links._links) == {"0b", "1a"}
    assert torch.equal(combined(remote, dispatch, 40), expected(rows, experts))
    leaving.close()


def test_each_group_is_said_to_take_as_long_as_it_took(running: Shards) -> None:
    """Once all were said to take as long as the slowest."""

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        time.sleep(0.4 if layer == 2 else 0)
        return maths(GROUPS[1].experts)(layer, rows, counts)

    running.start("1a", 1, run)
    remote = both(running)
    latency = running.transports[0].latency

    def is_told_apart() -> bool:
        before = [latency[group].total_s for group in (0, 1)]
        dispatch = remote.dispatch(2, *batch(40))
        combined(remote, dispatch, 40)
        fast, slow = (latency[group].total_s - before[group] for group in (0, 1))
        assert slow > 0.39
        return fast < 0.35

    wait_for(is_told_apart, LONG_S, "both")  # whoever is kept from a core for so long sees both answers at once


class Elsewhere(Tensor):
    """As if it were on a device."""

    is_cpu = False  # type: ignore[assignment]


@pytest.fixture
def on_device(running: Shards, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    return OnDevice(running, monkeypatch)


class OnDevice:
    """A dispatch whose answers belong on a device, and what was done with its memory and its queue."""

    def __init__(self, running: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running = running
        self.pinned, self.waits, self.staged = 0, 0, 0
        monkeypatch.setattr(fast_path, "pinned", self._pinned)
        monkeypatch.setattr(fast_path, "wait_for_queue", self._wait)
        monkeypatch.setattr(memory, "pin", self._pin)

    def _pin(self, whole: Tensor) -> None:
        assert whole.nbytes % 4096 == whole.data_ptr() % 4096 == 0, "pages"
        self.pinned += 1

    def _wait(self, _: torch.device) -> None:
        self.waits += 1

    def _pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.staged += 1
        return torch.empty(*shape, dtype=dtype)

    def send(self, rows: Tensor, experts: Tensor, layer: int = LAYER) -> tuple[FastFlight, Tensor]:
        """The flight, and where its answers belong."""
        sent: list[Any] = []
        path = self.running.transports[0]._fast_path

        class Transport:
            def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Any:
                sent.append(path.send(layer, rows, [part._replace(answers=answers) for part in parts]))
                return sent[0]

        answers = torch.full((experts.numel(), WIDTH), 7.0, dtype=rows.dtype).as_subclass(Elsewhere)
        transport: Any = Transport()
        Dispatcher(GROUPS, transport).dispatch(layer, rows, experts)
        assert isinstance(sent[0], FastFlight)
        return sent[0], answers


def alone(rows: Tensor, experts: Tensor, layer: int = LAYER) -> Tensor:
    """The answers [K * T, D], as a dispatch to local experts has them."""
    dispatch = Dispatcher(GROUPS, LocalMaths()).dispatch(layer, rows, experts)
    dispatch.flight.wait()
    return dispatch.answers


def test_answers_that_belong_on_a_device_are_copied_there_from_where_they_lie(
    running: Shards, on_device: OnDevice
) -> None:
    """Memory is made known to the device once a connection, and its slots are free when the device has read them."""
    both(running)
    for num_rows in (1, 9, 200):
        rows, experts = batch(num_rows, seed=num_rows)
        flight, answers = on_device.send(rows, experts)
        flight.wait()
        flight.close()
        assert torch.equal(torch.Tensor(answers), torch.Tensor(alone(rows, experts)))
        assert none_has_slots(running)
    assert (on_device.pinned, on_device.waits, on_device.staged) == (2, 3, 0)
    assert len(running.transports[0]._fast_path._spaces) == 1


def test_those_that_are_not_finite_are_asked_for_again(running: Shards, on_device: OnDevice) -> None:
    run, said = said_once(torch.inf)
    running.start("0a", 0, run)
    both(running)
    rows, experts = batch(9)
    flight, answers = on_device.send(rows, experts)
    flight.wait()
    flight.close()
    assert torch.equal(torch.Tensor(answers), torch.Tensor(alone(rows, experts)))
    assert (len(said), on_device.staged) == (3, 1)
    assert none_has_slots(running)


def test_no_room_for_an_answer_that_comes_while_another_is_waited_for_costs_no_slots(
    running: Shards, on_device: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two microbatches: nobody had its slots any more, until the connection ended."""
    both(running)
    rows, experts = batch(1)[0], torch.tensor([[GROUPS[0].experts[0], GROUPS[1].experts[0]]])
    first, _ = on_device.send(rows, experts)
    second, _ = on_device.send(rows, experts)

    def no_room(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(fast_path, "pinned", no_room)
    with pytest.raises(RuntimeError, match="out of memory"):
        second.wait()
    for flight in (second, first):
        flight.close()
    wait_for(lambda: not sum(link.owed() for link in running.links()), LONG_S, "what nobody waits for has come")
    assert none_has_slots(running)


def test_those_of_a_shard_that_died_come_from_the_next_one(running: Shards, on_device: OnDevice) -> None:
    run, entered, opened = stopped_in_layer_2()
    running.start("0a", 0, run)
    both(running)
    rows, experts = batch(40)
    flight, answers = on_device.send(rows, experts, 2)
    assert entered.wait(LONG_S)
    die_over_rows(running, opened)
    flight.wait()
    flight.close()
    assert torch.equal(torch.Tensor(answers), torch.Tensor(alone(rows, experts, 2)))
    assert none_has_slots(running)


def test_a_lost_connection_is_not_read_by_its_number(running: Shards) -> None:
    """Its descriptor may be somebody else's by the time it is waited for."""
    remote = both(running)
    rows, experts = batch(40)
    dispatch = remote.dispatch(LAYER, rows, experts)
    numbers = [link.descriptor for link in running.links()]
    for link in running.links():
        link.give_up("lost")
    pairs = [socket.socketpair() for _ in range(4)]
    ours = [one for pair in pairs for one in pair]
    assert {one.fileno() for one in ours} & set(numbers)
    for one in ours:
        one.send(b"x" * HEAD_BYTES)
    assert torch.equal(combined(remote, dispatch, 40), expected(rows, experts))
    for one in ours:
        assert len(one.recv(1000, socket.MSG_DONTWAIT)) == HEAD_BYTES
        one.close()


def test_flights_leave_no_garbage_behind(running: Shards) -> None:
    """What a cycle keeps, keeps the memory of a connection that is gone."""
    remote = both(running)
    spaces = running.transports[0]._fast_path._spaces
    for _ in range(5):
        ask(remote, *batch(40))
    assert len(spaces) == 1
    assert spaces[0].rows is None
    running.transports[0].close()
    for server in running.servers.values():
        server.close()
    maps = Path("/proc/self/maps")
    wait_for(lambda: "memfd:manta-rows" not in maps.read_text(), 60, "its mappings to go")


class Said:
    """Flights over one connection whose other end is the test's."""

    def __init__(self, number: int) -> None:
        ours, self.shard = socket.socketpair()
        self.memory, descriptor = create(ROW_BYTES)
        self.link = link = Link(ours, 0, SharedMemory(descriptor, self.memory.num_slots, self.memory.slot_bytes))
        os.close(descriptor)
        routes: Any = SimpleNamespace(only=lambda: {0: (NOBODY, link)})
        ids = count(1)
        carrier = LaneCarrier(routes, ids)
        self.deliveries: Any = Deliveries(carrier, routes, RoutingTable(), {}, 3 * LONG_S, {0: DispatchCounts()})
        self.states = self.memory.states.view(torch.int64).view(-1, STATE_BYTES // 8)[:, 0]  # of each slot
        path = FastPath(self.deliveries, routes, ids, None)
        rows = torch.arange(10 * WIDTH).view(10, WIDTH).to(torch.bfloat16)
        self.places = [torch.full((10, WIDTH), 7.0, dtype=torch.bfloat16) for _ in range(number)]
        self.flights = []
        for answers in self.places:
            flight = path.send(0, rows, [GroupRows(0, np.arange(9), (4, 5), answers, 0)])
            assert flight is not None
            self.flights.append(flight)
        self.attempts = [flight.attempts[0] for flight in self.flights]
        self.heads = [bytes(self.shard.recv(HEAD_BYTES + 8))[:HEAD_BYTES] for _ in self.flights]


def test_an_answer_is_taken_where_it_is_looked_for_without_a_head() -> None:
    case = Said(1)
    with case.shard:
        [flight], [attempt] = case.flights, case.attempts
        assert case.states[0] == LOOKED_AT
        case.states[0] = ANSWERED_STATE
        assert flight._take_answers()
        assert not case.link.outstanding
        assert len(case.link.memory.slots) == 1, "it is still read"
        flight.release()
        assert len(case.link.memory.slots) == 0
        assert attempt.state is ANSWERED
    case.link.close()


def test_who_sleeps_is_told_by_a_head() -> None:
    case = Said(2)
    with case.shard:

        def answer() -> None:
            for index in (0, 1):
                wait_for(lambda: case.states[index] != LOOKED_AT, LONG_S, "it to sleep")  # noqa: B023
                case.shard.sendall(answer_head(case.heads[index]))

        thread = threading.Thread(target=answer)
        thread.start()
        for flight in case.flights:
            assert flight._take_answers()
            flight.release()
        thread.join(LONG_S)
        assert case.states[:2].tolist() == [0, 0]
    case.link.close()


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_flight_that_is_dropped_leaves_nothing_that_nobody_tells_of(is_answered: bool) -> None:
    """The shard would have answered where nobody looks any more, and the slots would have been taken for ever."""
    case = Said(1)
    with case.shard:
        if is_answered:
            case.states[0] = ANSWERED_STATE
        case.flights[0].close()
        assert len(case.link.memory.slots) == len(case.link.forgotten) == (not is_answered)
        if not is_answered:
            assert case.states[0] == 0
            case.shard.sendall(answer_head(case.heads[0]))
            assert case.link.owed() == 0
        assert len(case.link.memory.slots) == 0
    case.link.close()


def test_what_is_no_answer_is_heard_of_while_answers_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors and the end come over the socket alone, at which few looks are taken."""
    monkeypatch.setattr(fast_path, "SOON_S", LONG_S)
    case = Said(1)
    case.deliveries.answers_soon = True
    case.shard.close()
    started = time.monotonic()
    assert not case.flights[0]._take_answers()
    assert time.monotonic() - started < LONG_S / 2
    case.link.close()


def damaged(random_: random.Random, heads: Sequence[bytes]) -> bytes:
    """What a hostile shard may say: right heads, heads of others, damaged ones, and noise."""
    said = b""
    for _ in range(random_.randint(1, 6)):
        reply = bytearray(answer_head(random_.choice(heads)))
        match random_.randrange(5):
            case 0 | 1:
                pass
            case 2:
                reply[random_.randrange(HEAD_BYTES)] = random_.randrange(256)
            case 3:
                reply[34:36] = random_.randrange(2**16).to_bytes(2, "little")  # another slot
            case 4:
                reply = bytearray(random_.randbytes(random_.randint(1, 100)))
        said += reply
    return said


@pytest.mark.parametrize("num_cases", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_hostile_shard_changes_nothing_but_its_answers(num_cases: int) -> None:
    """A flight is answered only by its own head, its answer is its slot's, and nothing is written beside it."""
    nobody, fast, handed_over = LaneAttempt(NOBODY, 0, 0, NOTHING), 0, 0
    for seed in range(num_cases):
        random_ = random.Random(seed)
        case = Said(3)
        noise = bytearray(random_.randbytes(len(case.memory.answers)))
        case.memory.answers.copy_(torch.frombuffer(noise, dtype=torch.uint8))
        said = damaged(random_, case.heads)
        for slot in range(3):
            if random_.random() < 0.3:
                case.states[slot] = random_.choice((0, LOOKED_AT, ANSWERED_STATE, 3, -1, 2**40))
        marked = [int(state) == ANSWERED_STATE for state in case.states[:3]]
        with case.shard:
            case.shard.sendall(said)
            case.shard.shutdown(socket.SHUT_WR)
            for index in random_.sample(range(3), 3):
                flight, attempt = case.flights[index], case.attempts[index]
                slot = (attempt.slot - 1) * case.memory.slot_bytes
                if flight._take_answers():
                    fast += 1
                    assert marked[index] or answer_head(case.heads[index]) in said
                    at = flight.space.words[fast_path.HEADER + fast_path.ANSWERS]
                    assert at == attempt.shared.answers_at + slot
                    flight.release()
                    assert (case.places[index] == 7.0).all()
                elif attempt.state is ANSWERED:
                    handed_over += 1
                    assert marked[index] or answer_head(case.heads[index]) in said
                    wanted = case.memory.answers[slot : slot + 9 * ROW_BYTES].view(torch.bfloat16).view(9, WIDTH)
                    assert case.places[index][:9].view(torch.int16).equal(wanted.view(torch.int16))
                    assert (case.places[index][9] == 7.0).all()
                else:
                    assert (case.places[index] == 7.0).all()
            try:
                while True:
                    case.link.receive(nobody, socket.MSG_DONTWAIT)
            except (LinkLost, BlockingIOError):
                pass
        assert not any(attempt.state is POSTED for attempt in case.attempts), "the link was lost"
        case.link.close()
    assert fast > num_cases / 8
    assert handed_over > num_cases / 20


def test_experts_that_write_into_slots_give_the_bits_of_local_ones(checkpoint: Checkpoint, running: Shards) -> None:
    load_kernels()  # no answer waits for it
    architecture = checkpoint.architecture
    experts = {
        group.index: Experts.load(checkpoint, group.experts, dtype=torch.bfloat16, device=torch.device("cpu"))
        for group in GROUPS
    }
    for group, of_group in experts.items():
        shape = LaneShape(architecture.num_layers, len(of_group.experts), architecture.hidden_size, torch.bfloat16)
        server = LaneServer(
            of_group, shape, secret=lanes.SECRET, fingerprint=lanes.FINGERPRINT, prepare=of_group.prepared
        )
        server.start()
        running.servers[f"{group}a"] = server
    running.publish()
    remote, local = Dispatcher(GROUPS, running.transport()), Dispatcher(GROUPS, LocalTransport(experts))
    for layer in range(architecture.num_layers):
        for num_rows in (1, 3, 200, 1, 1, 3, 1, 1, 3):
            rows = torch.randn(num_rows, architecture.hidden_size).bfloat16()
            chosen, weights = torch.rand(num_rows, architecture.num_experts).topk(2).indices, torch.rand(num_rows, 2)
            dispatch = remote.dispatch(layer, rows, chosen)
            assert isinstance(dispatch.flight, FastFlight) or layer == 0
            expected = local.combine(local.dispatch(layer, rows, chosen), weights)
            assert torch.equal(remote.combine(dispatch, weights), expected)
    assert none_has_slots(running)
    for server in running.servers.values():
        stats = server.stats()
        assert 0 < stats.compiled.frames < stats.frames, "the first of a kind takes Python, the next like it does not"
