"""Rows and answers in memory that two ends map and their GPUs read and write by themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from experts_service.carriers.fast_path import FastFlight
from experts_service.device import pin
from experts_service.shard.server import LaneServer
from experts_service.wire.frame import LaneShape
from experts_service.wire.shared_memory import create
from router_service.dispatcher import Dispatcher
from tests.experts_service import lanes
from tests.experts_service.carriers.test_device_slots import ShardProcess
from tests.experts_service.lanes import FINGERPRINT, GROUPS, NUM_LAYERS, SECRET, Shards, maths, shards
from tests.waiting import wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WIDTH = 64


def test_a_memfd_is_pinned_until_it_is_unmapped() -> None:
    memory, descriptor = create(2 * WIDTH)
    os.close(descriptor)
    assert memory.pin(pin)
    rows = memory.requests[: 32 * 2 * WIDTH].view(torch.bfloat16)
    assert rows.is_pinned()
    rows.fill_(3.0)
    there = rows.to("cuda", non_blocking=True)
    memory.answers[: 32 * 2 * WIDTH].view(torch.bfloat16).copy_(there + 1)
    assert (memory.answers[: 32 * 2 * WIDTH].view(torch.bfloat16) == 4.0).all()
    again, descriptor = create(2 * WIDTH)
    os.close(descriptor)
    del memory, rows
    assert again.pin(pin), "the same place in memory, perhaps: it was made unknown"


def test_a_step_of_experts_on_gpus_has_the_bits_of_their_maths(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the coordinator's GPU to the shards' and back, through slots."""
    monkeypatch.setattr(lanes, "MEMORY", True)
    monkeypatch.setattr(lanes, "HIDDEN", WIDTH)

    def on_gpu(experts: Sequence[int]) -> object:
        run = maths(experts)

        def run_there(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
            answer = run(layer, rows.to("cuda", non_blocking=True), counts)
            return answer.cpu() if answers is None else answers.copy_(answer)

        return run_there

    with shards(dtype=torch.bfloat16) as running:
        for group in GROUPS:
            shape = LaneShape(NUM_LAYERS, len(group.experts), WIDTH, torch.bfloat16)
            server = LaneServer(
                on_gpu(group.experts),  # type: ignore[arg-type]
                shape,
                secret=SECRET,
                fingerprint=FINGERPRINT,
                pinned=True,
            )
            server.start()
            running.servers[f"{group.index}a"] = server
        running.publish()
        remote = Dispatcher(GROUPS, running.transport())
        sent = 0
        for seed, num_rows in enumerate((1, 1, 3, 64, 500, 1)):
            rows, experts = lanes.batch(num_rows, torch.bfloat16, seed)
            weights = torch.rand(num_rows, 2, generator=torch.Generator().manual_seed(seed))
            on_device = [one.cuda() for one in (rows, experts, weights)]
            dispatch = remote.dispatch(1, *on_device[:2])
            sent += isinstance(dispatch.flight, FastFlight)
            total = remote.combine(dispatch, on_device[2])
            dispatch.close()
            parts = [
                maths(range(4))(1, rows.cuda(), [num_rows * (e == expert) for e in range(4)]) for expert in range(4)
            ]
            of_expert = torch.stack(parts, 1)  # [T, E, D]
            order = experts.argsort(1).cuda()
            chosen, of_chosen = on_device[1].gather(1, order), on_device[2].gather(1, order)
            terms = of_expert.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
            terms = (terms.float() * of_chosen[..., None]).bfloat16()
            assert torch.equal(total, terms[:, 0] + terms[:, 1]), num_rows
        assert sent >= 4
        assert all(server.stats().in_memory for server in running.servers.values())


def test_slots_on_a_card_have_the_bits_of_those_on_the_host_and_outlive_who_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards are processes of their own on the coordinator's card. Where that cannot be, it is skipped with the log."""
    monkeypatch.setattr(lanes, "MEMORY", True)
    monkeypatch.setattr(lanes, "HIDDEN", 32)
    batches = [[one.cuda() for one in lanes.batch(rows, torch.bfloat16, rows)] for rows in (1, 40, 500)]

    def ask(remote: Dispatcher, layer: int = 1) -> list[Tensor]:
        return [lanes.ask(remote, rows, experts, layer) for rows, experts in batches]

    def connected(running: Shards, device: torch.device | None) -> Dispatcher:
        monkeypatch.setattr(lanes, "DEVICE", device)
        remote = Dispatcher(GROUPS, running.transport())
        ask(remote)
        return remote

    started = [ShardProcess(group, "cuda") for group in (0, 1)]
    try:
        with shards(dtype=torch.bfloat16) as running:
            running.servers = {f"{group}a": shard for group, shard in enumerate(started)}  # type: ignore[misc]
            running.publish()
            on_host = ask(connected(running, None))
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            remote = connected(running, torch.device("cuda"))
            transport = running.transports[1]
            if not transport.takes_device_rows:
                pytest.skip("this driver shares no memory of the card: the log says why")
            assert all(map(torch.equal, ask(remote), on_host))
            dispatch = remote.dispatch(2, *batches[2])
            assert isinstance(dispatch.flight, FastFlight)
            assert started[0].line() == "computing into memory"
            os.kill(started[0].process.pid, signal.SIGKILL)
            started[0].process.wait(10)
            [attempt] = [one for one in dispatch.flight.attempts if one.part.group == 0]
            left = bytearray(64)
            attempt.shared.read(attempt.slot, memoryview(left), in_device=True)
            assert left == torch.full((32,), 7.0).bfloat16().view(torch.uint8).numpy().tobytes(), "it is still mapped"
            started.append(ShardProcess(0, "cuda"))
            running.servers["0a"] = started[-1]  # type: ignore[assignment]
            dispatch.close()
            del attempt, dispatch
            wait_for(lambda: all(map(torch.equal, ask(remote), on_host)), 30, "the shard to be back")
            transport.close()
            torch.cuda.empty_cache()
            wait_for(lambda: torch.cuda.mem_get_info()[0] >= free - 2**26, 30, "the card's memory to be free again")
        assert torch.equal(torch.ones(4, device="cuda").cpu(), torch.ones(4)), "the device is as it was"
    finally:
        for shard in started:
            shard.close()
