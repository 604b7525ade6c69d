"""A replica for which there is no room makes Ray's own autoscaler add a node, and lands there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.hosts import NotPossible, hosts
from tests.programs import REPOSITORY

pytestmark = pytest.mark.root

TIMEOUT_S = 240


def test_a_pending_replica_adds_a_node_and_lands_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    directory = tempfile.mkdtemp(prefix="mh")  # short: sockets lie below
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": directory,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m"]
    command += ["tests.end_to_end.deployment.autoscaled_experts", str(tmp_path / "tiny")]
    try:
        with hosts(1) as (host,):
            script = host.start(
                command,
                env=environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output, _ = script.communicate(timeout=TIMEOUT_S)
    except NotPossible as reason:
        pytest.skip(str(reason))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert script.returncode == 0, output
    seen = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))  # Ray talks, too
    assert len(seen["nodes"]) == 2
    assert sorted(seen["replicas"]) == sorted(seen["nodes"]), "one on each"
