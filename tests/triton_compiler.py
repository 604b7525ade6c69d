"""Has Triton compile what is launched, for a card that nobody has: all that a compiler finds wrong, it finds here.

Only in a process whose kernels are not interpreted: TRITON_INTERPRET is read when their modules are imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A kernel as a card of that kind would run it."""

    name: str
    shared: int  # bytes of shared memory that a program takes
    binary: bytes  # the assembler has made it


def compile_for(capability: int, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
    """`kernel` as `launch` is given it, for a capability: 80, 90. Arguments are specialised as Triton does it."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | {name: constants[name] for name in names if name in constants}
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given[name]
        if parameter.is_constexpr or value is None:
            signature[name], values[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_NAMES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[index,] = _ALIGNED
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = _ALIGNED
        else:
            signature[name] = "fp32"
    options = {name: value for name, value in constants.items() if name not in names}
    made = triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
    return Compiled(kernel.fn.__name__, made.metadata.shared, made.asm["cubin"])
