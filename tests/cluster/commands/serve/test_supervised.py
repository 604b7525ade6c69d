"""How `manta serve` ends, whatever became of its server: in time, in words, and with all that it had started."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.processes import has_ended
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

TIMEOUT_S = 120  # of a busy machine


@contextmanager
def supervised(how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that ends so, and the id of a process that it has started."""
    command = program("cluster.supervised_server", how)
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, error = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said.strip(), error.strip()


def wait_until_it_says(process: subprocess.Popen[str], word: str) -> None:
    """Before a signal, which would come to a server that is not ready for it."""
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("ends_well", 0, ""),
        ("ends_with_3", 3, ""),
        ("ends_natively", 2, "ended without a word (exit code 1, as of Ray where it loses its GCS)"),
        ("is_killed", 2, "ended without a word (SIGKILL)"),
        ("gives_up", 2, "Ray has died"),
    ],
)
def test_it_ends_as_its_server_has_and_leaves_nothing(how: str, code: int, words: str) -> None:
    """Where Ray ended it without a word, HAProxy stayed, and kept the port."""
    with supervised(how) as (process, left):
        returned, _, error = ended(process)
        assert returned == code
        assert (words in error) if words else not error
        assert not psutil.pid_exists(left)


def test_ctrl_c_is_the_servers() -> None:
    with supervised("waits") as (process, left):
        wait_until_it_says(process, "waits")
        process.send_signal(signal.SIGINT)
        assert ended(process) == (0, "interrupted", "")
        assert not psutil.pid_exists(left)


def test_a_server_that_is_stopped_before_it_listens_has_stopped() -> None:
    """It "was ended without a word (SIGTERM)", with code 2, where weights were still being fetched for example."""
    with supervised("starts") as (process, left):
        wait_until_it_says(process, "starts")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "", "")
        assert not psutil.pid_exists(left)


def test_ctrl_c_ends_a_server_that_nothing_reaches() -> None:
    """Without raylet and GCS, Ray held it for a minute."""
    with supervised("holds_on") as (process, left):
        wait_until_it_says(process, "holds")
        process.send_signal(signal.SIGINT)
        code, _, error = ended(process)
        assert (code, "did not end in time, so it was killed" in error) == (2, True)
        assert not psutil.pid_exists(left)


def test_a_server_does_not_outlive_its_supervisor() -> None:
    with supervised("waits") as (process, left):
        wait_until_it_says(process, "waits")
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=TIMEOUT_S)[0] == "interrupted\n"
        started = psutil.Process(left)
        started.kill()  # nobody is there who would
        wait_for(lambda: has_ended(started), TIMEOUT_S, "its end")
