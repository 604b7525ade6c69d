"""What one process of a cluster does alone."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from uuid import uuid4

import pytest

from cluster.commands.one_at_a_time import one_at_a_time
from cluster.errors import SetupError, Unavailable
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for


def test_the_second_is_told_who_is_first_and_enters_once_that_has_ended_however(ray_cluster: str) -> None:
    """Two `manta apply` at a time took each other's models out of the gateway."""
    what = f"manta test {uuid4()}"
    command = program("cluster.does_alone", ray_cluster, what)
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "in\n"
            told = f"{what} runs on this cluster already: process {first.pid} on "
            with pytest.raises(SetupError, match=told), one_at_a_time(what):
                pass
        finally:
            first.kill()

    def can_enter() -> bool:
        with suppress(SetupError, Unavailable), one_at_a_time(what):
            return True
        return False

    wait_for(can_enter, 60, "Ray to see that the first has ended")
    assert can_enter(), "who leaves lets go at once"
