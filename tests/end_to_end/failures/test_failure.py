"""Processes die while streams run: every stream is complete, and has the tokens of a run that nothing disturbed."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.conftest import DTYPES, Server, running_server
from tests.processes import processes
from tests.steady_streams import choices_of_stream
from tests.waiting import wait_for

NUM_STREAMS, NUM_TOKENS = 8, 100
CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    num_coordinators: 2
    engine: {{dtype: DTYPE, batch_invariant: "on", max_model_len: 1024, kv_cache_gib: 0.1}}
    experts: {{groups: [[0, 1, 2, 3], [4, 5, 6, 7]], scaling: {{min_replicas: 2, max_replicas: 2}}}}
gateway: {{num_replicas: 2}}
"""
IN_8_BITS = pytest.param("bfloat16, kv_cache_dtype: int8", marks=pytest.mark.long)
GATEWAY = "ServeReplica:gateway:gateway"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
RECOVERY_S = 120  # for a replaced process to serve again


MERITS = [f"merit_{number}" for number in range(8)]  # a call with all of them takes about as long as an answer
PARAMETERS = {"type": "object", "properties": {merit: {"type": "boolean"} for merit in MERITS}, "required": MERITS}
TOOL = {"type": "function", "function": {"name": "praise", "parameters": PARAMETERS}}


@dataclass
class Stream:
    """What one client saw, by choice."""

    token_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[int, tuple[str, str]] = field(default_factory=dict)  # names and arguments
    finish_reasons: dict[int, str] = field(default_factory=dict)
    is_broken: bool = False  # its connection ended early
    longest_gap_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))

    def add(self, choice: dict[str, Any]) -> None:
        """A part of one choice."""
        index = choice["index"]
        self.token_ids[index] += choice["token_ids"]
        if choice.get("logprobs"):
            self.logprobs[index] += choice["logprobs"]["token_logprobs"]
        for call in choice.get("delta", {}).get("tool_calls", ()):
            name, arguments = self.calls.get(call["index"], ("", ""))
            called = call["function"]
            self.calls[call["index"]] = (name + called.get("name", ""), arguments + called["arguments"])
        if choice["finish_reason"] is not None:
            self.finish_reasons[index] = choice["finish_reason"]


@pytest.fixture(scope="module", params=[*DTYPES, IN_8_BITS])
def replicated(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Two gateways, two coordinators, and two replicas of each of two groups."""
    with running_server(CONFIG.replace("DTYPE", request.param)) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(replicated) -> list[Stream]:
    seen = asyncio.run(streams(replicated))
    assert [len(stream.finish_reasons) for stream in seen] == [1, 1, 2, 2] + [1] * (NUM_STREAMS - 4)
    assert all(stream.calls for stream in seen[:2])
    return seen


def body(index: int) -> dict[str, object]:
    """Half of the streams greedy, half sampled with a seed; one of each with two choices, one of each a tool call."""
    sampling = {"temperature": 0} if index % 2 else {"temperature": 1.0, "seed": 100 + index}
    asked = {"model": "demo", "max_tokens": NUM_TOKENS, "stream": True, "return_token_ids": True, **sampling}
    prompt = f"Question {index}: what is a good cheese?"
    if index < 2:
        messages = [{"role": "user", "content": prompt}]
        called = {"tools": [TOOL], "tool_choice": "any", "parallel_tool_calls": False}
        return {**asked, "messages": messages, "max_tokens": 2 * NUM_TOKENS, **called}
    several = {"n": 2, "logprobs": 1} if index < 4 else {}
    return {**asked, "prompt": prompt, "ignore_eos": True, **several}


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
                stream.add(choice)
            now = time.monotonic()
            stream.longest_gap_s, last = max(stream.longest_gap_s, now - last), now

    async def disturb_midway() -> None:
        while sum(stream.num_tokens for stream in seen) < NUM_STREAMS * NUM_TOKENS / 3:
            await asyncio.sleep(0.01)
        if disturb is not None:
            await asyncio.to_thread(disturb)

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client, asyncio.TaskGroup() as tasks:
        for index in range(NUM_STREAMS):
            tasks.create_task(read(client, index))
        tasks.create_task(disturb_midway())
    return seen


def answers(server: Server) -> bool:
    return httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def check_equal(seen: list[Stream], undisturbed: list[Stream]) -> None:
    assert not any(stream.is_broken for stream in seen)
    print(f"longest gap {max(stream.longest_gap_s for stream in seen):.2f} s")
    for stream, whole in zip(seen, undisturbed, strict=True):
        assert stream.finish_reasons == whole.finish_reasons
        assert stream.token_ids == whole.token_ids
        assert stream.calls == whole.calls
        for choice, logprobs in whole.logprobs.items():
            assert stream.logprobs[choice] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("victims", [("ray::ExpertShard",), (":expert-0", ":coordinator")])
def test_killed_processes_cost_no_stream_a_token(replicated, undisturbed, victims):
    kill(replicated, undisturbed, *victims)


def test_a_stopped_shard_delays_no_stream(replicated, undisturbed):
    """It neither answers nor closes its connections, so nothing but its silence tells."""
    [stopped, *_] = processes(replicated, "ray::ExpertShard")
    try:
        seen = asyncio.run(streams(replicated, stopped.suspend))
    finally:
        stopped.resume()
    check_equal(seen, undisturbed)
    assert max(stream.longest_gap_s for stream in seen) < 10, "promised within a second"


def test_a_coordinator_that_falls_silent_costs_no_stream_a_token(replicated, undisturbed):
    """As one does that was cut off: its connections stay open, and Serve takes half a minute to replace it."""
    gap_s = 0.0
    for number in range(2):  # all streams may have been with the other one
        wait_for(lambda: num_coordinators(replicated) == 2, RECOVERY_S, "two coordinators that serve")
        stopped = processes(replicated, ":coordinator")[number]
        try:
            seen = asyncio.run(streams(replicated, stopped.suspend))
        finally:
            stopped.resume()
        check_equal(seen, undisturbed)
        gap_s = max(stream.longest_gap_s for stream in seen)
        if gap_s > 2:
            break
    assert 2 < gap_s < 25, "promised within 8 s"
    wait_for(lambda: num_running(replicated) == 0, RECOVERY_S, "the silent one to give up what was taken from it")


def test_a_killed_gateway_ends_its_own_connections_and_no_others(replicated, undisturbed):
    """They end without a last token, so that nobody takes them for complete, and their sequences are given up."""
    gateways = processes(replicated, GATEWAY)
    assert len(gateways) == 2
    seen = asyncio.run(streams(replicated, gateways[0].kill))
    broken = [stream.is_broken for stream in seen]
    assert 0 < sum(broken) < NUM_STREAMS, "HAProxy spreads connections over both gateways"
    for stream, whole in zip(seen, undisturbed, strict=True):
        if stream.is_broken:
            assert stream.finish_reasons.keys() < whole.finish_reasons.keys()
            for choice, token_ids in stream.token_ids.items():
                assert token_ids == whole.token_ids[choice][: len(token_ids)]
        else:
            assert (stream.finish_reasons, stream.token_ids) == (whole.finish_reasons, whole.token_ids)
    check_equal(asyncio.run(streams(replicated)), undisturbed)  # the other one takes what comes next
    wait_until_whole(replicated, GATEWAY, len(gateways))
    wait_for(lambda: num_running(replicated) == 0, RECOVERY_S, "the sequences of the lost gateway to be given up")


def test_sigterm_to_a_gateway_ends_no_stream_of_either_door(replicated, undisturbed):
    """Ray ended the process at once, and its streams with it. It ends by itself now, and what is new goes elsewhere.

    Its log says so: what is no line of `gateway` was said to Serve, which left out what it took for an INFO.
    """
    gateways = processes(replicated, GATEWAY)
    assert len(gateways) == 2
    log = Path(os.readlink(f"/proc/{gateways[0].pid}/fd/1"))
    with grpc_streams(replicated) as calls:
        seen = asyncio.run(streams(replicated, lambda: terminate(replicated, gateways[0])))
    check_equal(seen, undisturbed)
    assert [call.result() for call in calls] == [calls[0].result()] * len(calls)
    gateways[0].wait(RECOVERY_S)
    assert " WARNING cluster.termination: SIGTERM: the process ends once its requests have" in log.read_text()
    wait_until_whole(replicated, GATEWAY, len(gateways))


@pytest.mark.long
@pytest.mark.parametrize("title", [":coordinator", ":expert-0", "ray::ExpertShard"])
def test_sigterm_costs_no_stream_a_token(replicated, undisturbed, title):
    """What a coordinator says of it is written at once: Serve kept back a thousand lines."""
    before = processes(replicated, title)
    logs = Path(os.readlink(f"/proc/{before[0].pid}/fd/1")).parent / "serve"
    seen = asyncio.run(streams(replicated, before[0].terminate))
    check_equal(seen, undisturbed)
    before[0].wait(RECOVERY_S)
    if title == ":coordinator":
        said = "".join(file.read_text() for file in logs.glob("replica_*_coordinator_*.log"))
        assert said.count("SIGTERM: the process ends once its requests have") == 1
    wait_until_whole(replicated, title, len(before))


def terminate(server: Server, process: psutil.Process) -> None:
    """SIGTERM, and while the process still ends new requests at both doors, each on a connection of its own."""
    process.terminate()
    ends_at = time.monotonic() + 6
    while time.monotonic() < ends_at:
        answer = httpx.get(f"{server.url}/version", timeout=60)
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
        with grpc.insecure_channel(server.grpc_address, OWN_CONNECTION) as channel:
            assert chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest(), timeout=60).models
        time.sleep(0.1)


@contextmanager
def grpc_streams(server: Server) -> Iterator[list[Future[list[int]]]]:
    """Eight streams of one request, each on a connection of its own, once all have begun; then their tokens."""
    sampling = chat_pb2.Sampling(temperature=0.0, max_tokens=4 * NUM_TOKENS, ignore_eos=True)
    request = chat_pb2.GenerateRequest(model="demo", text="Once upon a time", sampling=sampling)
    begun = threading.Barrier(NUM_STREAMS + 1)

    def stream() -> list[int]:
        with grpc.insecure_channel(server.grpc_address, OWN_CONNECTION) as channel:
            chunks = chat_pb2_grpc.MantaStub(channel).GenerateStream(request, timeout=300)
            token_ids = list(next(chunks).choice.token_ids)
            begun.wait(60)
            token_ids += [token_id for chunk in chunks for token_id in chunk.choice.token_ids]
        assert len(token_ids) == 4 * NUM_TOKENS
        return token_ids

    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        calls = [threads.submit(stream) for _ in range(NUM_STREAMS)]
        begun.wait(60)
        yield calls


def num_coordinators(server: Server) -> int:
    """Those that serve; the process of one that still loads its weights is there before."""
    return len(series(server, "vllm:num_requests_running"))


def num_running(server: Server) -> int:
    """Sequences in all coordinators."""
    return total(server, "vllm:num_requests_running")


def total(server: Server, name: str) -> int:
    """A figure of /metrics, summed over all processes."""
    values = series(server, name)
    assert values
    return int(sum(values))


def series(server: Server, name: str) -> list[float]:
    """A figure of /metrics, as each process gave it."""
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    return [float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE)]


def test_streams_wait_for_shards_that_are_all_gone(replicated, undisturbed):
    """No copy of any group is left: the steps are held while Ray restarts the shards and they load."""
    shards = processes(replicated, "ray::ExpertShard")
    seen = asyncio.run(streams(replicated, lambda: [shard.kill() for shard in shards]))
    check_equal(seen, undisturbed)
    gap_s = max(stream.longest_gap_s for stream in seen)
    assert gap_s < 100, "promised within 10 s on a quiet machine"
    wait_until_whole(replicated, "ray::ExpertShard", len(shards))


@pytest.mark.long
def test_a_shard_ten_times_slower_is_hedged_and_hardly_any_where_nothing_is_slow(replicated, undisturbed):
    def hedges_and_dispatches() -> np.ndarray[Any, Any]:
        time.sleep(1.1)  # the page is kept for a second
        names = ("manta_dispatch_hedges_total", "manta_dispatch_seconds_count")
        return np.array([total(replicated, name) for name in names])

    before = hedges_and_dispatches()
    for _ in range(3):
        check_equal(asyncio.run(streams(replicated)), undisturbed)
    hedges, dispatches = hedges_and_dispatches() - before
    print(f"{hedges} of {dispatches} dispatches hedged")
    assert hedges < 0.05 * dispatches + 20, "each coordinator may hedge ten at once"

    [slow, *_] = processes(replicated, "ray::ExpertShard")
    stop = threading.Event()

    def slow_down() -> None:
        while not stop.is_set():
            slow.suspend()
            time.sleep(0.18)  # long beside what a dispatch takes on a busy machine: with 18 ms nobody hedged there
            slow.resume()
            time.sleep(0.02)

    thread = threading.Thread(target=slow_down)
    try:
        seen = asyncio.run(streams(replicated, thread.start))
    finally:
        stop.set()
        thread.join()
    check_equal(seen, undisturbed)
    assert (hedges_and_dispatches() - before)[0] > hedges
    assert max(stream.longest_gap_s for stream in seen) < 10, "promised within a second"


@pytest.mark.long
def test_twenty_killed_coordinators_cost_no_stream_a_token(replicated, undisturbed):
    for _ in range(20):
        kill(replicated, undisturbed, ":coordinator")


def kill(server: Server, undisturbed: list[Stream], *titles: str) -> None:
    """Kill a process of each title while streams run, and wait until others have taken their places."""
    before = {title: processes(server, title) for title in titles}
    assert all(len(found) >= 2 for found in before.values())
    check_equal(asyncio.run(streams(server, lambda: [found[0].kill() for found in before.values()])), undisturbed)
    for title, found in before.items():
        wait_until_whole(server, title, len(found))


def wait_until_whole(server: Server, victim: str, number: int) -> None:
    """Not only until there is a new process: what dies while a shard still starts may be the last of its group."""
    wait_for(lambda: len(processes(server, victim)) >= number and answers(server), RECOVERY_S, f"a new {victim}")
    wait_for(lambda: len(series(server, "manta_shard_load_seconds")) == 4, RECOVERY_S, "every shard to be loaded")
