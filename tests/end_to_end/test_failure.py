"""Processes die while streams run: every stream is complete, and has the tokens of a run that nothing disturbed."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server, running_server
from tests.processes import processes
from tests.steady_streams import choices_of_stream
from tests.waiting import wait_for

NUM_STREAMS, NUM_TOKENS = 8, 150
DEMO = Path(__file__).parents[2] / "cluster" / "demo_model"
CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    num_coordinators: 2
    engine: {{dtype: float32, max_model_len: 512, kv_cache_gib: 0.1}}
    experts: {{groups: [[0, 1, 2, 3], [4, 5, 6, 7]], scaling: {{min_replicas: 2, max_replicas: 2}}}}
gateway: {{num_replicas: 2}}
"""
GATEWAY = "ServeReplica:gateway:gateway"
RECOVERY_S = 120  # for a replaced process to serve again


@dataclass
class Stream:
    """What one client saw."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_broken: bool = False  # its connection ended early
    longest_gap_s: float = 0.0


@pytest.fixture(scope="module")
def replicated(tmp_path_factory) -> Iterator[Server]:
    """Two gateways, two coordinators, and two replicas of each of two groups."""
    file = tmp_path_factory.mktemp("replicated") / "manta.yaml"
    file.write_text(CONFIG)
    with running_server("--config", str(file)) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(replicated) -> list[Stream]:
    return asyncio.run(streams(replicated))


def body(index: int) -> dict[str, object]:
    """Half of the streams greedy, half sampled with a seed."""
    sampling = {"temperature": 0} if index % 2 else {"temperature": 1.0, "seed": 100 + index}
    asked = {"model": "demo", "prompt": f"Question {index}: what is a good cheese?", "max_tokens": NUM_TOKENS}
    return {**asked, **sampling, "ignore_eos": True, "stream": True, "return_token_ids": True}


async def streams(server: Server, disturb: Callable[[], None] | None = None) -> list[Stream]:
    """Run all streams at once; `disturb` is called when a third of the tokens is there."""
    seen = [Stream() for _ in range(NUM_STREAMS)]

    async def read(client: httpx.AsyncClient, index: int) -> None:
        try:
            await read_to_the_end(client, index)
        except httpx.TransportError:
            seen[index].is_broken = True

    async def read_to_the_end(client: httpx.AsyncClient, index: int) -> None:
        stream, last = seen[index], time.monotonic()
        async for choices in choices_of_stream(client, body(index)):
            for choice in choices:
                stream.token_ids += choice["token_ids"]
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
            now = time.monotonic()
            stream.longest_gap_s, last = max(stream.longest_gap_s, now - last), now

    async def disturb_midway() -> None:
        while sum(len(stream.token_ids) for stream in seen) < NUM_STREAMS * NUM_TOKENS / 3:
            await asyncio.sleep(0.01)
        if disturb is not None:
            await asyncio.to_thread(disturb)

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client, asyncio.TaskGroup() as tasks:
        for index in range(NUM_STREAMS):
            tasks.create_task(read(client, index))
        tasks.create_task(disturb_midway())
    return seen


def answers(server: Server) -> bool:
    return httpx.get(f"{server.url}/health", timeout=10).status_code == 200


def check_equal(seen: list[Stream], undisturbed: list[Stream]) -> None:
    assert not any(stream.is_broken for stream in seen)
    assert [stream.finish_reason for stream in seen] == ["length"] * NUM_STREAMS
    assert [stream.token_ids for stream in seen] == [stream.token_ids for stream in undisturbed]


@pytest.mark.parametrize("victim", ["ray::ExpertShard", ":expert-0", ":coordinator"])
def test_a_killed_process_costs_no_stream_a_token(replicated, undisturbed, victim):
    kill_one(replicated, undisturbed, victim)


def test_a_stopped_shard_delays_no_stream(replicated, undisturbed):
    """It neither answers nor closes its connections, so nothing but its silence tells."""
    [stopped, *_] = processes(replicated, "ray::ExpertShard")
    try:
        seen = asyncio.run(streams(replicated, stopped.suspend))
    finally:
        stopped.resume()
    check_equal(seen, undisturbed)
    assert max(stream.longest_gap_s for stream in seen) < 10, "promised within a second"


def test_a_killed_gateway_ends_its_own_connections_and_no_others(replicated, undisturbed):
    """They end without a last token, so that nobody takes them for complete, and their sequences are given up."""
    gateways = processes(replicated, GATEWAY)
    assert len(gateways) == 2
    seen = asyncio.run(streams(replicated, gateways[0].kill))
    broken = [stream.is_broken for stream in seen]
    assert 0 < sum(broken) < NUM_STREAMS, "HAProxy spreads connections over both gateways"
    for stream, whole in zip(seen, undisturbed, strict=True):
        if stream.is_broken:
            assert stream.finish_reason is None
            assert stream.token_ids == whole.token_ids[: len(stream.token_ids)]
        else:
            assert (stream.finish_reason, stream.token_ids) == ("length", whole.token_ids)
    check_equal(asyncio.run(streams(replicated)), undisturbed)  # the other one takes what comes next
    wait_until_whole(replicated, GATEWAY, len(gateways))
    wait_for(lambda: num_running(replicated) == 0, RECOVERY_S, "the sequences of the lost gateway to be given up")


def num_running(server: Server) -> int:
    """Sequences in all coordinators."""
    page = httpx.get(f"{server.url}/metrics", timeout=10).text
    values = re.findall(r"^vllm:num_requests_running{[^}]*} (\S+)$", page, re.MULTILINE)
    assert values
    return int(sum(map(float, values)))


def test_streams_wait_for_shards_that_are_all_gone(replicated, undisturbed):
    """No copy of any group is left: the steps are held while Ray restarts the shards and they load."""
    shards = processes(replicated, "ray::ExpertShard")
    seen = asyncio.run(streams(replicated, lambda: [shard.kill() for shard in shards]))
    check_equal(seen, undisturbed)
    gap_s = max(stream.longest_gap_s for stream in seen)
    assert gap_s < 100, "promised within 10 s on a quiet machine"
    wait_until_whole(replicated, "ray::ExpertShard", len(shards))


@pytest.mark.long
def test_twenty_killed_coordinators_cost_no_stream_a_token(replicated, undisturbed):
    for _ in range(20):
        kill_one(replicated, undisturbed, ":coordinator")


@pytest.mark.long
@pytest.mark.parametrize("victim", ["ray::ExpertShard", ":expert-"])
def test_an_expert_killed_every_two_seconds_costs_no_stream_a_token(replicated, undisturbed, victim):
    """For a minute; a second replica of the group is awaited before the next, or nothing could answer."""
    number = len(processes(replicated, victim))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        kill_one(replicated, undisturbed, victim)
        time.sleep(2)
    assert len(processes(replicated, victim)) >= number


def kill_one(server: Server, undisturbed: list[Stream], victim: str) -> None:
    """Kill a process of this title while streams run, and wait until another has taken its place."""
    before = processes(server, victim)
    assert len(before) >= 2
    check_equal(asyncio.run(streams(server, lambda: before[0].send_signal(signal.SIGKILL))), undisturbed)
    wait_until_whole(server, victim, len(before))


def wait_until_whole(server: Server, victim: str, number: int) -> None:
    wait_for(lambda: len(processes(server, victim)) >= number and answers(server), RECOVERY_S, f"a new {victim}")
