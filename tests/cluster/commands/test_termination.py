"""SIGTERM to a process whose code runs beside the main thread, as that of Ray's actors does."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.programs import REPOSITORY, program


@contextmanager
def replica(grace_s: float, serve_sees_it_s: float = 0.2) -> Iterator[subprocess.Popen[str]]:
    command = program("cluster.terminated_replica", grace_s, serve_sees_it_s)
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_is_unhealthy_at_once_and_ends_once_it_is_drained() -> None:
    """Ray's handler ended it at once, with all of its streams."""
    with replica(grace_s=60) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "unhealthy\n"]
        process.send_signal(signal.SIGTERM)  # an impatient one says so twice
        time.sleep(0.1)
        said, _ = process.communicate(timeout=180)  # closes its input
        assert said == "drains\ndrained\n"
        assert process.returncode == 0


@pytest.mark.parametrize("grace_s", [0.5])
def test_it_ends_after_its_grace_whatever_still_runs(grace_s: float) -> None:
    with replica(grace_s) as process:
        assert process.stdout is not None
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(180)
        assert process.stdout.read().split() == ["begun", "unhealthy", "drains"]
        assert time.monotonic() - started >= grace_s


def test_it_drains_once_serve_has_had_time_to_see_it() -> None:
    """It drained at once, and gRPC calls that HAProxy sent it as that ended were CANCELLED: two of 20,000."""
    with replica(grace_s=60, serve_sees_it_s=1.0) as process:
        assert process.stdout is not None
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert [process.stdout.readline() for _ in range(3)] == ["begun\n", "unhealthy\n", "drains\n"]
        assert time.monotonic() - started >= 1
