"""Memory of weights, each in a mapping of its own. Knows sizes; knows no weight.

Among what is read and dropped while a model loads, malloc keeps nearly as much as it gives: a process that loaded the
bench model's experts, 1.4 GB, held 3.5 GB for good. A mapping goes back whole. What rounding and packing need for a
moment is not mapped, and malloc kept 320 MB of it beside 680 of weights of 8 bits.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch


def mapped(nbytes: int) -> torch.Tensor:
    """Zeros, uint8 [nbytes], page-aligned; in huge pages where there are any, since weights are read every step."""
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def give_back_freed() -> None:
    """What malloc keeps of freed memory goes back to the system, where the C library can (glibc)."""
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
