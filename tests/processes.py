"""The processes of a running server, and what `manta status` says of them."""

from __future__ import annotations

import subprocess
import sys

import psutil

from tests.conftest import Server


def processes(server: Server, title: str) -> list[psutil.Process]:
    """Those whose command line has `title` in it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if title in command_line(child)]


def command_line(process: psutil.Process) -> str:
    """Empty of one that has ended, which may be before its parent knows."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


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
