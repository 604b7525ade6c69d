"""What is said of a cluster that does not answer, on a machine that is busy with other things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from cluster.commands.cluster_connection import _silent, look_at_cluster, slowness
from cluster.errors import Unavailable
from tests.processes import has_ended
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

COMPUTES = "while True: pass"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how long a process waits for a core")
def test_a_process_that_shares_its_core_is_slow() -> None:
    core = min(os.sched_getaffinity(0))
    rivals = [
        subprocess.Popen([sys.executable, "-c", COMPUTES], preexec_fn=lambda: os.sched_setaffinity(0, (core,)))
        for _ in range(3)
    ]
    try:
        wait_for(lambda: slowness(rivals[0].pid) > 2, 60, "one of three on a core to be twice as slow")
    finally:
        for one in rivals:
            one.kill()
            one.wait()
    assert slowness(rivals[0].pid) == 1.0, "nothing is known of it"


def test_who_gives_a_cluster_up_says_that_its_own_machine_is_busy() -> None:
    """Beside three busy processes the cluster alone was blamed, which was well."""
    said = "the Ray cluster at a:1 did not answer within 10 s: it could not be joined"
    assert _silent("a:1", "it could not be joined", 10.0, 1.1).message == said
    busy = _silent("a:1", "it could not be joined", 10.0, 2.02).message
    assert busy == f"{said}; this machine is so busy that programs take 2.0 times as long: try again"


def test_a_host_that_none_can_be_is_told() -> None:
    """Python's own words for it, and a stack, were shown."""
    with pytest.raises(Unavailable, match=r"no Ray cluster answers at head\.\.local:6379"):
        look_at_cluster("head..local:6379", str)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_looks_does_not_outlive_the_command(number: signal.Signals) -> None:
    """After `timeout 60 manta apply` a driver of Ray was left, for as long as a model found no room."""
    command = program("cluster.look_for_ever")
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            looking = psutil.Process(int(process.stdout.readline()))
        finally:
            process.send_signal(number)
        try:
            process.wait(120)
            wait_for(lambda: has_ended(looking), 60, "its end")
        finally:
            with suppress(psutil.NoSuchProcess):
                looking.kill()
