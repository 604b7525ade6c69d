"""The processes of a running server, and what `manta status` says of them."""

from __future__ import annotations

import subprocess
import sys

import psutil

from tests.conftest import Server


def processes(server: Server, title: str) -> list[psutil.Process]:
    """Those whose command line has `title` in it."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def status(server: Server, *options: str) -> str:
    """What `manta status` says of it."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "status", "--address", server.ray_address, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
