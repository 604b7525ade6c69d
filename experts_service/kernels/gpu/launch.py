"""How a Triton kernel is started, and whether one can be. Knows no kernel.

Triton compiles a kernel on its first call, and needs a C compiler for that. Without a GPU its interpreter
(TRITON_INTERPRET=1, set before a kernel's module is imported) runs the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch

Grid = tuple[int, ...]


class Kernel(Protocol):
    """What `triton.jit` makes of a function."""

    def __getitem__(self, grid: Grid) -> Callable[..., object]:
        """The kernel, to be started in so many programs along each axis."""


@cache
def can_compile() -> bool:
    """Whether Triton is installed and finds the C compiler that it needs, as it looks for one; or interprets."""
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)


@cache
def compiles_for(device: torch.device) -> bool:
    """Whether kernels are compiled for it: an NVIDIA GPU from Ampere on, which multiplies bf16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and can_compile()


def launch(kernel: Kernel, grid: Grid, *arguments: Any, **constants: Any) -> None:
    """Start `kernel` in `grid` programs, behind what the current stream has to do. Does not wait.

    The one place where kernels are started, so that a test can count them and look at what they are given.
    """
    kernel[grid](*arguments, **constants)
