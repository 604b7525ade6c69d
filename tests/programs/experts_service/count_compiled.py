"""Counts to ten by a kernel, as one of Manta's processes would run it: compiled now, or read from where it was kept."""

from __future__ import annotations

from experts_service.kernels.compiled.jit import kernel


@kernel
def count_to(number: int) -> int:
    total = 0
    for _ in range(number):
        total += 1
    return total


if __name__ == "__main__":
    print(count_to(10))
