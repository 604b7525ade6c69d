"""How much memory this process has resident, at most, while something runs. Linux tells; elsewhere nothing is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_RESET_PEAK = "5"  # what clear_refs(5) in proc(5) takes to forget the highest resident set


@dataclass(slots=True)
class ResidentMemory:
    """In bytes. None until the block has ended, and where the system does not tell."""

    before: int | None = None
    peak: int | None = None

    @property
    def grown(self) -> int | None:
        """How much more than before there was at the peak."""
        return None if self.before is None or self.peak is None else max(0, self.peak - self.before)


@contextmanager
def resident_memory() -> Iterator[ResidentMemory]:
    """Watches the whole process during the block. Two at a time would disturb each other."""
    memory = ResidentMemory()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        memory.before = _status("VmRSS")
    except OSError:
        yield memory
        return
    yield memory
    memory.peak = _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
