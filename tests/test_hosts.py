"""The hosts that other tests rely on: they reach each other, and do not when they are cut off, dead or gone."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.hosts import Host, NotPossible, hosts
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def two() -> Iterator[tuple[Host, ...]]:
    try:
        with hosts(2) as (near, far):
            yield near, far
    except NotPossible as reason:
        pytest.skip(str(reason))


def connect(near: Host, far: Host) -> socket.socket:
    """A connection to the echo on `far`, which is started."""
    far.start(program("end_to_end.echo_server"), cwd=REPOSITORY)
    connected: list[socket.socket] = []

    def is_there() -> bool:
        try:
            connected.append(near.run(lambda: socket.create_connection((far.address, 7777), 1)))
        except OSError:
            return False
        return True

    wait_for(is_there, 30, "the echo")
    return connected[0]


def echo_s(channel: socket.socket, timeout_s: float) -> float:
    """Seconds until a word comes back."""
    started = time.monotonic()
    channel.settimeout(timeout_s)
    channel.sendall(b"word")
    assert channel.recv(100) == b"word"
    return time.monotonic() - started


def test_a_host_is_cut_off_and_comes_back_with_its_connections(two) -> None:
    near, far = two
    with connect(near, far) as channel:
        echo_s(channel, 5)
        far.cut()
        with pytest.raises(TimeoutError):
            echo_s(channel, 1)
        far.rejoin()
        channel.settimeout(20)
        assert channel.recv(100) == b"word", "TCP sent it again"


def test_a_killed_host_closes_its_connections(two) -> None:
    near, far = two
    with connect(near, far) as channel:
        far.kill()
        assert far.process_ids() == []
        channel.settimeout(5)
        with suppress(ConnectionResetError):
            assert channel.recv(100) == b"", "nothing but the end"


def test_lost_packets_delay_words_and_lose_none(two) -> None:
    near, far = two
    with connect(near, far) as channel:
        try:
            far.lose(0.05)
        except NotPossible as reason:
            pytest.skip(f"packets cannot be dropped: {reason}")
        seconds = [echo_s(channel, 30) for _ in range(200)]
        assert sum(s > 0.15 for s in seconds) >= 3, "of 400 packets about 20 are sent again, 200 ms later"
        far.lose(0)
        assert sum(echo_s(channel, 30) > 0.15 for _ in range(200)) <= 1


def test_packets_take_longer_and_all_of_many_come(two) -> None:
    near, far = two
    with connect(near, far) as channel:
        far.delay(0.05)
        wait_for(lambda: echo_s(channel, 20) >= 0.1, 20, "the slow cable")
        seconds = [echo_s(channel, 20) for _ in range(10)]
        assert min(seconds) >= 0.1, "there and back"
        assert sorted(seconds)[5] < 0.5
        many = b"word" * 100_000
        channel.settimeout(60)
        sender = threading.Thread(target=channel.sendall, args=(many,))
        sender.start()
        received = b""
        while len(received) < len(many):
            received += channel.recv(2**16)
        sender.join()
        assert received == many


def test_a_function_sees_the_host_it_runs_on(two) -> None:
    near, far = two
    with far.run(lambda: socket.create_server((far.address, 0))) as listener:
        address = listener.getsockname()
        near.run(lambda: socket.create_connection(address, 5)).close()
        with pytest.raises(OSError):
            socket.create_server((far.address, 0))


def test_what_a_killed_run_left_is_cleared_away(two) -> None:
    """Its processes still run, in namespaces that carry the number of a process that is gone."""
    run = subprocess.Popen(
        program("end_to_end.leave_hosts"), cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    sleeper = int(run.stdout.readline())
    run.kill()
    run.communicate()
    with hosts(1) as (_other,):
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert f"manta-{run.pid}-" not in names
        wait_for(lambda: not os.path.exists(f"/proc/{sleeper}"), 5, "the end of a process that was left")
