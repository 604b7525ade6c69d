"""Rows and answers in slots on a GPU: the host's code path, where memory of the host stands for the GPU's."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from experts_service.carriers import fast_path
from experts_service.carriers.fast_path import FastFlight
from experts_service.device_memory import DeviceMemory
from experts_service.kernels.compiled.jit import AVAILABLE
from router_service.dispatcher import Dispatcher
from tests import fake_driver
from tests.experts_service import lanes
from tests.experts_service.carriers.test_fast_path import (
    ask,
    batch,
    both,
    combined,
    die_over_rows,
    expected,
    none_has_slots,
    said_once,
)
from tests.experts_service.lanes import GROUPS, LONG_S, Shards, shards, stopped_in_layer_2
from tests.fake_driver import CUresult, FakeDriver
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

pytestmark = [pytest.mark.usefixtures("memory"), pytest.mark.skipif(not AVAILABLE, reason="nothing is compiled")]

WIDTH, LAYER = 32, 1


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(lanes, "HIDDEN", WIDTH)
    monkeypatch.setattr(lanes, "DEVICE", fake_driver.DEVICE)
    monkeypatch.setattr(DeviceMemory, "tensor", DeviceMemory.tensor)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver())
    monkeypatch.setattr(fast_path, "OVERDUE_S", LONG_S)  # whoever is kept from its core does not take answers for late
    yield fake_driver.install()
    wait_for(lambda: not fake_driver.mappings() + fake_driver.descriptors(), LONG_S, "device memory to go")


@pytest.fixture
def running() -> Iterator[Shards]:
    with shards(dtype=torch.bfloat16) as started:
        yield started


def in_device(running: Shards) -> list[bool]:
    return [link.memory is not None and link.memory.in_device is not None for link in running.links()]


def host_slots(running: Shards) -> list[Tensor]:
    """The requests of each connection that are in host memory."""
    return [link.memory._memory.requests for link in running.links() if link.memory is not None]


def test_rows_and_answers_never_come_to_the_host(running: Shards, driver: FakeDriver) -> None:
    remote = both(running)
    assert in_device(running) == [True, True]
    for num_rows in (1, 2, 7, 64, 500):
        rows, experts = batch(num_rows, seed=num_rows)
        for requests in host_slots(running):
            requests.fill_(77)
        before = driver.copies
        dispatch = remote.dispatch(LAYER, rows, experts)
        assert isinstance(dispatch.flight, FastFlight)
        assert torch.equal(combined(remote, dispatch, num_rows), expected(rows, experts)), num_rows
        assert driver.copies == before + 2 * len(dispatch.flight._parts), "each part's rows, and its answer"
        assert all((requests == 77).all() for requests in host_slots(running))
        assert none_has_slots(running)
    assert running.transports[0].takes_device_rows
    assert fake_driver.mappings() == 4, "each end maps the memory of two lanes"
    assert fake_driver.descriptors() == 0


def test_heads_are_sent_when_rows_have_been_copied(running: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = both(running)
    queue: list[Callable[[], object]] = []
    write = DeviceMemory.write

    def late(self: DeviceMemory, at: int, data: Tensor) -> None:
        queue.append(lambda: write(self, at, data))

    def wait(_: torch.device) -> None:
        while queue:
            queue.pop(0)()

    monkeypatch.setattr(DeviceMemory, "write", late)
    monkeypatch.setattr(fast_path, "wait_for_queue", wait)
    for seed in range(5):
        rows, experts = batch(40, seed=seed)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))


def test_two_coordinators_and_flights_in_any_order(running: Shards) -> None:
    """Rows of both are merged; who is waited for first reads the head of another one's answer."""
    first = both(running)
    second = Dispatcher(GROUPS, running.transport())
    batches = [batch(20, seed=seed) for seed in range(4)]
    ask(second, *batches[0])
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        asked = [first, first, second, second]
        flights = [one.dispatch(LAYER, *two) for one, two in zip(asked, batches, strict=True)]
        for index in order:
            assert torch.equal(combined(asked[index], flights[index], 20), expected(*batches[index])), order
    assert none_has_slots(running)


def test_an_answer_that_is_not_finite_is_asked_for_again(running: Shards) -> None:
    run, said = said_once(torch.nan)
    running.start("0a", 0, run)
    remote = both(running)
    rows, experts = batch(9)
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
    assert entered.wait(LONG_S)
    die_over_rows(running, opened)
    assert torch.equal(combined(remote, dispatch, 40), expected(rows, experts, 2))
    assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
    assert none_has_slots(running)
    assert in_device(running) == [True, True]


def test_an_answer_that_others_read_the_head_of_comes_from_there(running: Shards) -> None:
    """As one does that is late: an ordinary flight takes over, whose answers are on the host."""
    run, entered, opened = stopped_in_layer_2()
    running.start("0a", 0, run)
    remote = both(running)
    rows, experts = batch(40)
    late = remote.dispatch(2, rows, experts)
    assert isinstance(late.flight, FastFlight)
    assert entered.wait(LONG_S)
    late.flight._as_ordinary()
    opened.set()
    assert torch.equal(combined(remote, late, 40), expected(rows, experts, 2))
    assert none_has_slots(running)


class Elsewhere(Tensor):
    """As if it were on a device."""

    is_cpu = False  # type: ignore[assignment]


def test_rows_that_stayed_on_the_device_are_copied_where_slots_are_on_the_host(
    running: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard came back without: the dispatch goes as others do, and the next rows come by the host."""
    copied: list[Tensor] = []

    def on_host(rows: Tensor) -> Tensor:
        copied.append(rows)
        return rows.as_subclass(Tensor).contiguous()

    monkeypatch.setattr("experts_service.carriers.lane.on_host", on_host)
    remote = both(running)
    rows, experts = batch(40)
    ask(remote, rows, experts)
    transport = running.transports[0]
    assert transport.takes_device_rows
    for link in running.links():
        assert link.memory is not None
        link.memory.in_device = None
    send = transport.send

    def send_from_there(layer: int, rows: Tensor, parts: Sequence[Any]) -> Any:
        return send(layer, rows.as_subclass(Elsewhere), parts)

    monkeypatch.setattr(transport, "send", send_from_there)
    assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
    assert len(copied) == 1
    assert not transport.takes_device_rows
    assert none_has_slots(running)


def test_one_shard_without_a_gpu_has_all_rows_come_by_the_host(
    running: Shards, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.start("0a", 0)
    monkeypatch.setattr(lanes, "DEVICE", None)
    running.start("1a", 1)
    monkeypatch.setattr(lanes, "DEVICE", fake_driver.DEVICE)
    remote = both(running)
    assert sorted(in_device(running)) == [False, True]
    before = driver.copies
    for num_rows in (1, 40):
        rows, experts = batch(num_rows)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
    assert driver.copies == before
    assert all(server.stats().in_memory for server in running.servers.values())


def _no_peer_access(driver: FakeDriver) -> None:
    driver.refuses["cuMemImportFromShareableHandle"] = CUresult.CUDA_ERROR_NOT_SUPPORTED


def _not_mapped(driver: FakeDriver) -> None:
    driver.refuses_access_to_imports = True


def _damaged(driver: FakeDriver) -> None:
    driver.damages = True


def _not_made(driver: FakeDriver) -> None:
    driver.refuses["cuMemCreate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY


def _not_exported(driver: FakeDriver) -> None:
    driver.refuses["cuMemExportToShareableHandle"] = CUresult.CUDA_ERROR_NOT_SUPPORTED


def _no_bindings(_: FakeDriver) -> None:
    sys.modules["cuda.bindings.driver"] = None  # type: ignore[assignment]  # as if it were not installed


OF_SHARD, OF_COORDINATOR = (
    "rows of a coordinator on this node lie in the host's memory, not in the GPU's: ",
    "rows for a shard on this node lie in the host's memory, not in its GPU's: ",
)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (_no_peer_access, f"{OF_COORDINATOR}cuMemImportFromShareableHandle: CUDA_ERROR_NOT_SUPPORTED"),
        (_not_mapped, f"{OF_COORDINATOR}cuMemSetAccess: CUDA_ERROR_INVALID_DEVICE"),
        (_damaged, f"{OF_COORDINATOR}bytes that were copied are others"),
        (_not_made, f"{OF_SHARD}cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"),
        (_not_exported, f"{OF_SHARD}cuMemExportToShareableHandle: CUDA_ERROR_NOT_SUPPORTED"),
        (_no_bindings, f"{OF_SHARD}the package cuda-bindings: import of cuda.bindings.driver halted"),
    ],
)
def test_where_memory_cannot_be_shared_rows_lie_in_the_hosts(
    running: Shards,
    driver: FakeDriver,
    caplog: pytest.LogCaptureFixture,
    cause: Callable[[FakeDriver], None],
    said: str,
) -> None:
    cause(driver)
    with caplog.at_level(logging.WARNING):
        remote = both(running)
        rows, experts = batch(40)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
    assert in_device(running) == [False, False]
    assert any(message.startswith(said) for message in caplog.messages), caplog.messages
    assert all(server.stats().in_memory for server in running.servers.values())
    assert not running.transports[0].takes_device_rows


def test_a_coordinator_without_a_gpu_is_given_none(running: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    for group in (0, 1):
        running.start(f"{group}a", group)
    monkeypatch.setattr(lanes, "DEVICE", None)
    rows, experts = batch(40)
    assert torch.equal(ask(both(running), rows, experts), expected(rows, experts))
    assert fake_driver.mappings() == 0


def test_more_rows_than_there_are_slots_are_sent(running: Shards) -> None:
    remote = both(running)
    rows, experts = batch(2100)[0], torch.tensor(GROUPS[0].experts).repeat(2100, 1)
    assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
    assert none_has_slots(running)


class ShardProcess:
    """A shard with slots on a GPU, that can be killed."""

    def __init__(self, group: int = 0, device: str = "device") -> None:
        self.process = subprocess.Popen(
            program("experts_service.lane_shard", group, device),
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.path, port = self.line().split()
        self.port = int(port)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait(LONG_S)


def test_a_shard_that_is_killed_over_its_rows_takes_no_memory_from_its_coordinator(running: Shards) -> None:
    """Half of an answer is where it would be read; what it made stays mapped, and goes when the connection does."""
    shard = ShardProcess()
    try:
        running.servers["0a"] = shard  # type: ignore[assignment]
        remote = both(running)
        assert in_device(running) == [True, True]
        assert fake_driver.mappings(shard.process.pid) == 1
        rows, experts = batch(300)
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        dispatch = remote.dispatch(2, rows, experts)
        assert isinstance(dispatch.flight, FastFlight)
        assert shard.line() == "computing into memory"
        attempts = [attempt for attempt in dispatch.flight.attempts if attempt.part.group == 0]
        os.kill(shard.process.pid, signal.SIGKILL)
        shard.process.wait(LONG_S)
        [attempt] = attempts
        half = bytearray(300 * WIDTH * 2)
        attempt.shared.read(attempt.slot, memoryview(half)[: 2 * WIDTH], in_device=True)
        assert half[: 2 * WIDTH] == torch.full((WIDTH,), 7.0).bfloat16().view(torch.uint8).numpy().tobytes()
        running.servers.pop("0a")
        running.start("0a", 0)
        assert torch.equal(combined(remote, dispatch, 300), expected(rows, experts, 2))
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        attempts.clear()
        del attempt, dispatch
        wait_for(lambda: fake_driver.mappings() == 4, LONG_S, "the memory of who was killed to go")
        assert none_has_slots(running)
    finally:
        shard.close()


def test_a_shard_that_is_stopped_and_goes_on_writes_where_nobody_else_has_rows(running: Shards) -> None:
    shard = ShardProcess()
    try:
        running.servers["0a"] = shard  # type: ignore[assignment]
        remote = both(running)
        os.kill(shard.process.pid, signal.SIGSTOP)
        late = remote.dispatch(LAYER, *batch(40, seed=1))
        dropped = remote.dispatch(LAYER, *batch(40, seed=2))
        dropped.close()
        going_on = threading.Timer(0.5, os.kill, (shard.process.pid, signal.SIGCONT))
        going_on.start()
        assert torch.equal(combined(remote, late, 40), expected(*batch(40, seed=1)))
        going_on.join()
        for seed in range(3):
            assert torch.equal(ask(remote, *batch(40, seed=seed)), expected(*batch(40, seed=seed)))
        assert none_has_slots(running)
        assert in_device(running) == [True, True]
    finally:
        shard.close()


def test_a_coordinator_that_is_killed_leaves_nothing_in_the_shards(running: Shards) -> None:
    run, entered, opened = stopped_in_layer_2()
    running.start("0a", 0, run)
    running.start("1a", 1)
    paths = [str(server.path) for server in running.servers.values()]
    child = subprocess.Popen(
        program("experts_service.lane_coordinator", *paths, "device"),
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(2)] == ["right", "waiting"]
        assert entered.wait(LONG_S)
        assert fake_driver.mappings(child.pid) == fake_driver.mappings() == 2
    finally:
        child.kill()
        child.wait(LONG_S)
        child.stdout.close()
    opened.set()
    wait_for(lambda: fake_driver.mappings() == 0, LONG_S, "the memory of who was killed to go")
    rows, experts = batch(30)
    assert torch.equal(ask(both(running), rows, experts), expected(rows, experts))
