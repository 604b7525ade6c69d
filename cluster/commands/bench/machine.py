"""What a benchmark ran on: hardware and versions, and how fast all cores together read memory. Times no model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

PROBE_BYTES = 2 * 2**30  # beyond every cache
PROBE_READS = 5
PACKAGES = ("manta-serve", "torch", "transformers", "ray")


@dataclass(frozen=True, slots=True)
class Machine:
    """Printed before every benchmark, and part of its JSON line."""

    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    gpus: tuple[str, ...]
    versions: dict[str, str]

    def lines(self) -> list[str]:
        """For a person."""
        gpus = ", ".join(self.gpus) or "no GPU"
        versions = " · ".join(f"{name} {version}" for name, version in self.versions.items())
        return [f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, {gpus}", versions]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def this_machine() -> Machine:
    """Without importing torch."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(_cpu(), _cores(), round(psutil.virtual_memory().total / 2**30, 1), _gpus(), versions)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.splitlines() if line.strip())


def read_bandwidth(device: str = "cpu", nbytes: int | None = None) -> float:
    """Bytes a second: the best of five reads by all cores (or the GPU), for each of two kernels that only read."""
    import torch

    nbytes = nbytes or PROBE_BYTES
    numbers = torch.ones(nbytes // 4096 // 4, 4096, device=device)
    ones = torch.ones(4096, device=device)
    best = float("inf")
    kernels: tuple[Callable[[], object], ...] = (lambda: numbers.sum(), lambda: numbers @ ones)
    for _ in range(PROBE_READS):
        for read in kernels:
            started = time.perf_counter()
            read()
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return numbers.nbytes / best
