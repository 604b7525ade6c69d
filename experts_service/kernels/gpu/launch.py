"""How a Triton kernel is started, and whether one can be. Knows no kernel.

Triton compiles a kernel on its first call, and needs a C compiler for that. Without a GPU its interpreter
(TRITON_INTERPRET=1, set before a kernel's module is imported) runs the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch

Grid = tuple[int, ...]


class Kernel(Protocol):
    """What `triton.jit` makes of a function, and what is compiled of that for one kind of arguments."""

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        """The kernel, to be started in so many programs along each axis."""


_Kinds = tuple[tuple[str, Callable[[Any], Hashable]], ...]
# Of each parameter of a kernel its name, and what the kernel is compiled for. By the kernel's id, for Triton's hash of
# it takes long; that the kernel is kept as well keeps the id its own.
_KINDS: dict[int, tuple[Kernel, _Kinds]] = {}
_COMPILED: dict[tuple[Hashable, ...], Kernel] = {}


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

    `arguments`, and the last ones by name among `constants`: its parameters. Other constants are options of Triton,
    `num_warps` for example.

    The one place where kernels are started, so that a test can count them and look at what they are given. What Triton
    does at each start takes the host longer than most kernels take a GPU. So it is asked once for each kind of
    arguments, and what it has compiled is kept here.
    """
    parameters = getattr(kernel, "params", None)
    if parameters is None:  # the interpreter compiles nothing
        kernel[grid](*arguments, **constants)
        return
    known = _KINDS.get(id(kernel))
    if known is None:
        known = _KINDS[id(kernel)] = kernel, tuple((one.name, _kind_of(one)) for one in parameters)
    kinds = known[1]
    values = [*arguments, *[constants[name] for name, _ in kinds[len(arguments) :]]]
    key = (id(kernel), *[kind(value) for (_, kind), value in zip(kinds, values, strict=True)], *constants.items())
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*values)


def _kind_of(parameter: Any) -> Callable[[Any], Hashable]:
    """What Triton looks at in an argument."""
    if parameter.is_constexpr:
        return _itself
    return _type if parameter.do_not_specialize else _kind


def _itself(constant: Any) -> Hashable:
    return constant  # type: ignore[no-any-return]


def _type(argument: Any) -> Hashable:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.get_device()  # what is compiled is loaded by one card
    return -(2**31) <= argument < 2**31 if type(argument) is int else argument.__class__.__name__  # a bool is none


def _kind(argument: Any) -> Hashable:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % 16
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, _type(argument)
    return _type(argument)
