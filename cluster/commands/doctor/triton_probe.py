"""The least that Triton can be asked for: a kernel that doubles numbers. Imported where Triton is known to be there."""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl

from experts_service.kernels.gpu.launch import launch

BLOCK = 256


@triton.jit
def _double(numbers, count, block: tl.constexpr):
    places = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(numbers + places, 2 * tl.load(numbers + places, places < count), places < count)


def double(numbers: torch.Tensor) -> None:
    """Each of them [N], in place."""
    launch(_double, (-(-len(numbers) // BLOCK),), numbers, len(numbers), block=BLOCK)
