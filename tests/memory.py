"""How much memory a call takes at its most, and what holds memory that processes share."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path


def peak_bytes(run) -> int:
    """Resident memory that a call takes at its most, beyond what there was before."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what malloc kept of earlier tests would serve the call
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = field("VmRSS")
    run()
    return field("VmHWM") - before


def mappings(name: str, process: int | str = "self") -> int:
    """How many memfds of that name a process maps."""
    return Path(f"/proc/{process}/maps").read_text().count(f"memfd:{name}")


def descriptors(name: str) -> int:
    """How many of them this process has open; its other threads may close some meanwhile."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        try:
            found += f"memfd:{name}" in os.readlink(one)
        except FileNotFoundError:
            continue
    return found
