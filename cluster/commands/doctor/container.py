"""How much memory a container leaves to this process. Knows the system's files of control groups (cgroup v2)."""

from __future__ import annotations

from experts_service.kernels.cores import control_groups


def memory_left() -> int | None:
    """Bytes until the tightest group around this process is full; None: no group has a limit.

    What only keeps files at hand is not counted as taken: the kernel gives it back.
    """
    left = []
    for directory in control_groups():
        try:
            most = int((directory / "memory.max").read_text())
            taken = int((directory / "memory.current").read_text())
            kept = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            left.append(max(0, most - taken + int(kept["inactive_file"])))
        except (OSError, ValueError, KeyError):  # the root has none of them, and a group without a limit says "max"
            continue
    return min(left, default=None)
