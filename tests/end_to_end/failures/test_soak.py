"""Streams without a pause while something dies every ten seconds: none fails, and memory stays what it was.

`make soak` runs it for an hour; MANTA_SOAK_S says for how many seconds.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from statistics import fmean

import httpx
import psutil
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.conftest import Server, running_server
from tests.processes import processes
from tests.steady_streams import SteadyStreams
from tests.waiting import wait_for

SOAK_S = float(os.environ.get("MANTA_SOAK_S", "600"))
FAULT_EVERY_S, STOPPED_S, RECOVERY_S = 10.0, 5.0, 180.0
NUM_CLIENTS, NUM_TOKENS = 6, 100
COORDINATOR, SERVICE, SHARD = ":coordinator", ":expert-", "ray::ExpertShard"
ROLES = (COORDINATOR, SERVICE, SHARD, ":gateway", "ServeController", "gcs_server", "raylet", "haproxy")
SLACK_BYTES = 64 * 2**20  # what allocators and logs may add to all processes together
CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    num_coordinators: 2
    engine: {{dtype: float32, max_model_len: 512, kv_cache_gib: 0.02}}  # small, so that it is soon touched all over
    experts: {{groups: [[0, 1, 2, 3], [4, 5, 6, 7]], scaling: {{min_replicas: 2, max_replicas: 2}}}}
"""


@pytest.mark.long
def test_a_fault_every_ten_seconds_fails_no_stream():
    with running_server(CONFIG) as server:
        soak(server, random.Random(0))


def soak(server: Server, drawn: random.Random) -> None:
    clients = SteadyStreams(
        server.url, "demo", [f"Question {index}: a cheese?" for index in range(NUM_CLIENTS)], NUM_TOKENS
    )
    clients.learn()
    numbers = {title: len(processes(server, title)) for title in (COORDINATOR, SERVICE, SHARD)}

    def is_whole() -> bool:
        healthy = httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        return healthy and all(len(processes(server, title)) == number for title, number in numbers.items())

    faults: dict[str, Callable[[], None]] = {
        "kill a shard": lambda: drawn.choice(processes(server, SHARD)).kill(),
        "kill the replica above a shard": lambda: drawn.choice(processes(server, SERVICE)).kill(),
        "kill a coordinator": lambda: drawn.choice(processes(server, COORDINATOR)).kill(),
        "stop a shard for a while": lambda: suspend(drawn.choice(processes(server, SHARD))),
    }
    memory: list[Counter[str]] = []
    with clients.running() as seen:
        deadline = time.monotonic() + SOAK_S
        at = time.monotonic()
        while time.monotonic() < deadline:
            time.sleep(max(0.0, at + FAULT_EVERY_S - time.monotonic()))
            at = time.monotonic()
            name = drawn.choice(sorted(faults))
            faults[name]()
            wait_for(is_whole, RECOVERY_S, f"recovery after: {name}")
            back_s = time.monotonic() - at
            memory.append(used_bytes(server))
            print(
                f"{name}: whole after {back_s:.1f} s, {seen.num_complete} streams complete, "
                f"longest gap {seen.longest_gap_s:.1f} s, {memory[-1].total() / 2**20:.0f} MiB",
                flush=True,
            )
            assert (seen.failures, seen.num_wrong) == ([], 0)
    assert (seen.failures, seen.num_wrong) == ([], 0)
    third = len(memory) // 3
    early, late = mean(memory[third : 2 * third]), mean(memory[2 * third :])
    grown = {role: round((late[role] - early[role]) / 2**20) for role in late}
    print(f"MiB more in the last third than in the second: {grown}")
    assert late.total() < early.total() + SLACK_BYTES, grown


def suspend(process: psutil.Process) -> None:
    process.suspend()
    time.sleep(STOPPED_S)
    process.resume()


def used_bytes(server: Server) -> Counter[str]:
    """What is each process's alone, added up by what it is."""
    used: Counter[str] = Counter()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            used[next((role for role in ROLES if role in title), "Ray")] += process.memory_full_info().uss
        except psutil.Error:
            continue
    return used


def mean(samples: list[Counter[str]]) -> Counter[str]:
    return Counter({role: round(fmean(sample[role] for sample in samples)) for role in (*ROLES, "Ray")})
