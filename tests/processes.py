"""The processes of a running server, each of which may end while it is looked at, and what `manta status` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.conftest import Server


def processes(server: Server, title: str) -> list[psutil.Process]:
    """Those whose command line has `title` in it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if title in command_line(child)]


def called(name: str, family: list[psutil.Process]) -> psutil.Process:
    """The only one of the family with that name."""
    [found] = [one for one in family if _name(one) == name]
    return found


def command_line(process: psutil.Process) -> str:
    """Empty of one that has ended, which may be before its parent knows."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def proc_file(process_id: int, name: str) -> str:
    """What the kernel's file of that name says of it; empty of one that has ended."""
    try:
        return Path(f"/proc/{process_id}/{name}").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def has_ended(process: psutil.Process) -> bool:
    """Also of one whose parent does not know yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
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
