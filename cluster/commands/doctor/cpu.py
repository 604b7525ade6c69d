"""Checks of what computes on a CPU. A GPU's machine has them too: experts may be on a tier of CPUs."""

from __future__ import annotations

import time

import torch

from cluster.commands.doctor.checks import Check, Finding, failed, good
from experts_service.kernels.compiled.jit import AVAILABLE, cache_directory, cpu_features
from experts_service.kernels.compiled.matmul import load_kernels
from experts_service.kernels.kernel import available
from router_service import rows
from router_service.attention import paged
from router_service.sampling.sampler import Sampler

CPU = torch.device("cpu")


def compiled() -> Finding:
    """Kernels of our own, compiled or read from where they are kept."""
    if not AVAILABLE:
        return failed(
            "numba cannot be imported, or compiles nothing: torch computes",
            'python -c "import numba" says why; without it bf16 takes about twice the time',
        )
    started = time.perf_counter()
    load_kernels()
    for dtype in (torch.bfloat16, torch.float32):
        paged.warm_up(dtype)
        rows.warm_up(dtype, CPU)
    Sampler(frozenset()).warm_up()
    seconds, directory = time.perf_counter() - started, cache_directory()
    if directory is None:
        return failed(
            f"compiled in {seconds:.1f} s, and kept nowhere: each process compiles them anew",
            "give this user a home, or XDG_CACHE_HOME, that it may write to and nobody else",
        )
    cpu = cpu_features().split(",")[0] or "this CPU"
    return good(f"{', '.join(available())} can multiply bf16 on {cpu}; ready in {seconds:.1f} s, kept in {directory}")


CHECKS = (Check("CPU kernels", "They multiply, attend and sample where there is no GPU.", compiled),)
