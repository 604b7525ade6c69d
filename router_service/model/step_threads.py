"""How many threads torch gets for a part of a step. Knows how much work there is, not what it is.

A matmul on all threads begins and ends with waking the others, 50 to 100 microseconds on a virtual machine, and waits
for the slowest of them, which another process may have put off its core. Little work is done sooner by one thread. Our
own kernels see to that themselves (routine.py), and what torch does between them it does on one thread anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiply-adds of one layer's attention that one thread does as fast as all: 16 rows of the bench model. There, on 2
# cores, the layers of a step with 16 rows took 2.0 ms each on one thread and 2.6 on both.
FEW_MULTIPLICATIONS = 48_000_000


class StepThreads:
    """All of a process's intra-op threads, or one of them."""

    def __init__(self, *, choose: bool = True) -> None:
        """`torch.set_num_threads` has been called: so many are all. Without `choose` they are always all."""
        self._all = torch.get_num_threads()
        self._choose = choose

    @contextmanager
    def for_work(self, multiplications: int) -> Iterator[None]:
        """Within the block as many threads as that work is worth. A call of torch's costs 0.2 microseconds."""
        if not self._choose or multiplications > FEW_MULTIPLICATIONS:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._all)
