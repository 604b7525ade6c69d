"""The HAProxy that `manta-haproxy` becomes, with configurations like Serve's."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD = """
global
    stats socket {directory}/cli mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 1s
    timeout client {client_timeout}
    timeout server 30s
"""
_CAP_SYS_RESOURCE, _PR_CAPBSET_DROP = 24, 24


def with_open_files(number: int) -> Callable[[], None]:
    """For Popen's `preexec_fn`: the program may have so many, also where it is root's."""

    def bound() -> None:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_SYS_RESOURCE, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))

    return bound


def write_config(directory: Path, rest: str, client_timeout: str = "5s") -> Path:
    """A file with Serve's settings and `rest`: what HAProxy listens on, and who is behind it."""
    file = directory / "haproxy.cfg"
    file.write_text(HEAD.format(directory=directory, client_timeout=client_timeout) + rest)
    return file


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`manta-haproxy`, as Serve starts it."""
    command = [Path(sys.executable).with_name("manta-haproxy"), "-f", config, "-db"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)
