"""A process of a group's two dies every two seconds for a minute, under sixteen streams: none fails or differs."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.conftest import DTYPES, Server, running_server
from tests.processes import command_line, processes
from tests.steady_streams import SteadyStreams
from tests.waiting import wait_for

CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    engine: {{dtype: DTYPE, batch_invariant: "on", max_model_len: 512, kv_cache_gib: 0.1}}
    experts: {{groups: [[0, 1, 2, 3, 4, 5, 6, 7]], scaling: {{min_replicas: 2, max_replicas: 2}}}}
"""
NUM_STREAMS, NUM_TOKENS = 16, 100
EVERY_S, FOR_S = 2.0, 60.0
KILLED_STARTING = 0.3  # of those that take the places of others; always, and the group would never be whole
RESTART_S = 60.0  # until the process is there, on a busy machine
LONGEST_GAP_S = 10.0  # ten times what is promised

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=DTYPES)
def pair(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One group with two replicas."""
    with running_server(CONFIG.replace("DTYPE", request.param)) as server:
        yield server


@pytest.mark.parametrize("role", ["ExpertShard", "ray::ServeReplica:demo"])
def test_one_of_two_is_killed_every_two_seconds(pair, role):
    """Either one while the coordinator has lanes to both, and now and then the one that starts in its place."""
    clients = SteadyStreams(pair.url, "demo", [f"Question {i}: a cheese?" for i in range(NUM_STREAMS)], NUM_TOKENS)
    clients.learn()
    drawn, served, starting = random.Random(0), 0, 0
    with clients.running() as seen:
        deadline = time.monotonic() + FOR_S
        while time.monotonic() < deadline:
            time.sleep(EVERY_S)
            if num_lanes(pair) < 2:
                continue
            victim = drawn.choice(of_experts(pair, role))
            victim.kill()
            victim.wait(RESTART_S)
            served += 1
            if drawn.random() < KILLED_STARTING:
                wait_for(lambda: len(of_experts(pair, role)) == 2, RESTART_S, "one that starts")
                max(of_experts(pair, role), key=psutil.Process.create_time).kill()
                starting += 1
    print(
        f"{role}: killed {served} that served, {starting} that started; {seen.num_complete} streams, "
        f"longest gap {seen.longest_gap_s:.2f} s"
    )
    assert (seen.failures, seen.num_wrong) == ([], 0)
    assert served >= 2
    assert starting >= 1
    assert seen.num_complete >= NUM_STREAMS
    assert seen.longest_gap_s < LONGEST_GAP_S


def of_experts(server: Server, role: str) -> list[psutil.Process]:
    """Processes of the group, not of the coordinator."""
    return [one for one in processes(server, role) if "coordinator" not in command_line(one)]


def num_lanes(server: Server) -> int:
    """Connections of the coordinator to shards."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(map(int, map(float, re.findall(r"^manta_shard_lanes{[^}]*} (\S+)$", page, re.MULTILINE))))
