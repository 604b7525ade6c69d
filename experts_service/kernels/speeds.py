"""How fast each kernel is on this CPU, measured once and kept beside compiled code. Knows no layer, chooses nothing.

A kernel's time is that of one thread for a matrix that no cache holds, by number of rows: few rows show how fast it
reads, many how fast it multiplies. The kernels take turns, and the fastest of several runs counts, so that what else
the machine does disturbs all alike.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from experts_service.kernels.compiled.jit import cache_directory, cpu_features, one_process
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.linear import Linear

ROWS = (1, 4, 16, 64)
_SHAPE = (2048, 2048)  # of a weight, 8 MB
_COPIES = 4  # that take turns, so that each has left the caches when it is read again
_MAX_S = 0.5  # for all; a slow kernel is measured less often

Speeds = Mapping[Kernel, tuple[float, ...]]  # seconds for each of ROWS


def speeds(kernels: Sequence[Kernel]) -> Speeds:
    """Those of `kernels`, measured here and now or by another process of this user on such a machine."""
    with one_process("measuring"):
        file = _file(kernels)
        kept = _read(file, kernels)
        if kept is not None:
            return kept
        measured = _measure(kernels)
        if file is not None:
            with suppress(OSError):  # no room: the next process measures again
                file.write_text(json.dumps({str(kernel): seconds for kernel, seconds in measured.items()}))
        return measured


def _file(kernels: Sequence[Kernel]) -> Path | None:
    directory = cache_directory()
    if directory is None:
        return None
    machine = (platform.machine(), cpu_features(), torch.__version__, ROWS, _SHAPE, tuple(map(str, kernels)))
    return directory / f"speeds-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"


def _read(file: Path | None, kernels: Sequence[Kernel]) -> Speeds | None:
    try:
        kept = json.loads(file.read_text()) if file is not None else {}
        return {kernel: tuple(map(float, kept[str(kernel)])) for kernel in kernels}
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or cut off
        return None


@torch.inference_mode()
def _measure(kernels: Sequence[Kernel]) -> Speeds:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = torch.randn(_SHAPE).bfloat16()
        matrices = {kernel: [Linear(weight.clone(), kernel) for _ in range(_COPIES)] for kernel in kernels}
        inputs = [torch.randn(rows, _SHAPE[1]).bfloat16() for rows in ROWS]
        best = {kernel: [float("inf")] * len(ROWS) for kernel in kernels}
        for of_kernel in matrices.values():
            of_kernel[0](inputs[0])  # compiles
        until = time.perf_counter() + _MAX_S
        for turn in range(2 * _COPIES):
            for index, x in enumerate(inputs):
                for kernel, of_kernel in matrices.items():
                    started = time.perf_counter()
                    of_kernel[turn % _COPIES](x)
                    best[kernel][index] = min(best[kernel][index], time.perf_counter() - started)
            if time.perf_counter() > until:
                break
        return {kernel: tuple(seconds) for kernel, seconds in best.items()}
    finally:
        torch.set_num_threads(before)
