"""Servers that start at the same moment choose different ports."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.ports import free_port

CLAIM = """
    import sys
    from cluster.commands.ray_environment import _free_port

    print(_free_port(int(sys.argv[1])), flush=True)
    sys.stdin.read()
"""


def start(port: int) -> subprocess.Popen[str]:
    """A process that wants this port, does not listen yet, and lives until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLAIM), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def chosen(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    return int(server.stdout.readline())


@pytest.fixture
def port() -> int:
    return free_port()


def test_two_servers_that_start_at_once_take_different_ports_and_the_port_is_free_again(port: int) -> None:
    servers = [start(port) for _ in range(2)]
    try:
        ports = [chosen(server) for server in servers]
        assert ports.count(port) == 1
        assert ports[0] != ports[1]
    finally:
        for server in servers:
            server.communicate(timeout=20)
    last = start(port)
    try:
        assert chosen(last) == port
    finally:
        last.communicate(timeout=20)
