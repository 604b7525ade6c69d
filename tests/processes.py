"""The processes of a running server."""

from __future__ import annotations

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
