"""What a coordinator's process is set to when its engine is built."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.checkpoints import write_checkpoint

PROGRAM = """
import sys
from pathlib import Path

import torch

from tests.router_service.engines import Bench

Bench(Path(sys.argv[1]), num_threads=None)
print(torch.get_num_threads())
"""


def test_the_coordinator_computes_on_all_cores(tmp_path):
    """Ray sets OMP_NUM_THREADS to 1 for an actor that reserves no whole CPU; coordinators once kept to it."""
    write_checkpoint(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == str(len(os.sched_getaffinity(0))), done.stderr
