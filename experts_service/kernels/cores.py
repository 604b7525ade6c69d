"""How many cores this process has, and its control groups. Knows the system's files; knows no thread."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cores() -> int:
    """Those it may run on, or as many as its containers' quotas are worth, rounded up, if that is fewer."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas()]))


def control_groups() -> list[Path]:
    """Directories of the process's control group and of those around it (cgroup v2); none where there is no such."""
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = CGROUPS / own.strip("/")
    return [group, *group.parents]


def _quotas() -> list[int]:
    quotas = []
    for directory in control_groups():
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root has none
            continue
        if quota != "max":
            quotas.append(math.ceil(int(quota) / int(period)))
    return quotas
