"""Servers that start at the same moment choose different ports."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster.commands.local_ray import ray_environment
from tests.ports import free_port
from tests.programs import REPOSITORY, program

NICENESS = "RAY_worker_niceness"  # as Ray spells it


def start(port: int) -> subprocess.Popen[str]:
    """A process that wants this port, does not listen yet, and lives until its input ends."""
    return subprocess.Popen(
        program("cluster.claim_port", port), cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def chosen(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    return int(server.stdout.readline())


@pytest.fixture
def port() -> int:
    return free_port()


def test_servers_that_start_at_once_take_different_ports_and_the_port_is_free_again(port: int) -> None:
    """Those of the second and third were any, and until HAProxy listened the kernel gave one to who connected."""
    servers = [start(port) for _ in range(3)]
    try:
        ports = {chosen(server) for server in servers}
        assert len(ports) == 3
        assert port in ports
        first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert max(ports) < first_of_kernel
    finally:
        for server in servers:
            server.communicate(timeout=180)
    last = start(port)
    try:
        assert chosen(last) == port
    finally:
        last.communicate(timeout=180)


def test_shards_of_a_benchmark_do_not_give_way_to_the_coordinator_that_runs_in_it(monkeypatch) -> None:
    """Ray starts workers at nice 15: beside other work a step over four shards took 1.7 times as long for that."""
    monkeypatch.setattr(os, "environ", {})
    ray_environment.prepare()
    assert NICENESS not in os.environ
    ray_environment.prepare_benchmark()
    assert os.environ[NICENESS] == "0"
    monkeypatch.setattr(os, "environ", {NICENESS: "7"})
    ray_environment.prepare_benchmark()
    assert os.environ[NICENESS] == "7", "the user's own"


def test_a_proxy_has_as_long_to_start_as_serve_waits_for_it(monkeypatch) -> None:
    """On a busy machine the controller killed it after 15 s, and `manta serve` failed: "The actor never ran"."""
    from ray.serve._private.constants import HTTP_PROXY_TIMEOUT, PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD

    monkeypatch.setattr(os, "environ", {"RAY_SERVE_ENABLE_HA_PROXY": "0"})
    ray_environment.prepare_server()
    once_s = float(os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"])
    assert once_s * PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD >= HTTP_PROXY_TIMEOUT
