"""What a coordinator's process is set to when its engine is built."""

from __future__ import annotations

import os

from tests.checkpoints import write_checkpoint
from tests.programs import said_by


def test_the_coordinator_computes_on_all_cores(tmp_path):
    """Ray sets OMP_NUM_THREADS to 1 for an actor that reserves no whole CPU; coordinators once kept to it."""
    write_checkpoint(tmp_path)
    said = said_by("router_service.report_threads", tmp_path, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert int(said) == len(os.sched_getaffinity(0))
