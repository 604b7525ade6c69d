"""Compiles the kernels of products for a card that need not be here, and says what they take of it, as JSON.

compile_products.py 90 — for compute capability 9.0, in the formats and tiles that Mixtral 8x7B's experts have. Without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experts_service.kernels.gpu import products
from experts_service.kernels.gpu.matrices import FLOAT8, INT4, INT8, PLAIN, Matrices, most_block

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 14336, 8
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32",
}  # fmt: skip


def matrices(kind: int, dtype: torch.dtype, outputs: int, inputs: int, group: int) -> Matrices:
    """Without memory, as `pack` makes them. In groups of 32: with zeros, and inputs in an order of their own."""
    groups = inputs // group if group else 1
    block = 256 // dtype.itemsize if kind == PLAIN else min(group or 128, most_block(dtype))
    stored = {PLAIN: dtype, INT8: torch.int8, INT4: torch.uint8, FLOAT8: torch.uint8}[kind]

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Matrices(
        weights=empty(EXPERTS, outputs, inputs // (2 if kind == INT4 else 1), dtype=stored),
        scales=None if kind == PLAIN else empty(EXPERTS, groups, outputs, dtype=torch.bfloat16),
        zeros=empty(EXPERTS, groups, outputs, dtype=torch.int16) if group == 32 else None,
        columns=empty(EXPERTS, inputs, dtype=torch.int32) if group == 32 else None,
        kind=kind,
        dtype=dtype,
        in_features=inputs,
        width=inputs,
        block=block,
        blocks_of_group=group // block,
    )


def compiled(capability: int, kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> dict[str, Any]:
    """What a launch with these arguments compiles to."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        if isinstance(argument, torch.Tensor):
            signature[name] = TYPES[argument.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name == "num_rows":
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = argument
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", said)[0])
    instructions = set(re.findall(r"(wgmma|tcgen05|mma)(?:\.mma_async)?\.(?:mma|sync)", made.asm["ptx"]))
    return {
        "kernel": kernel.__name__,
        "shared": made.metadata.shared,
        "registers": registers,
        "stack": stack,
        "instructions": sorted(instructions),
    }


def main(capability: int) -> None:
    """Both products, few rows and many, in each format."""
    found: list[dict[str, Any]] = []
    is_large = divmod(capability, 10) in products._LARGE_CARDS
    plain = products._PLAIN if is_large else products._PLAIN_SMALL
    products.tiles = lambda matrices: plain if matrices.kind == PLAIN else products._WIDENED
    started: list[tuple[Any, tuple[Any, ...], dict[str, int]]] = []
    products.launch = lambda kernel, _grid, *arguments, **options: started.append((kernel, arguments, options))  # type: ignore[assignment]
    bf16, fp32 = torch.bfloat16, torch.float32
    for kind, dtype, group in (
        (PLAIN, bf16, 0),
        (PLAIN, fp32, 0),
        (INT8, bf16, 0),
        (INT8, fp32, 0),
        (INT4, bf16, 32),
        (INT4, bf16, 128),
        (FLOAT8, bf16, 128),
    ):
        for rows in 2, 1024:
            started.clear()
            ends = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
            x = torch.empty(rows, HIDDEN, dtype=dtype, device="meta")
            hidden = products.gate_up(x, matrices(kind, dtype, 2 * INTERMEDIATE, HIDDEN, group), ends)
            products.multiply(hidden, matrices(kind, dtype, HIDDEN, INTERMEDIATE, group), ends)
            for kernel, arguments, options in started:
                of = {"kind": kind, "dtype": str(dtype), "rows": rows, "launched": len(started)}
                found.append(of | compiled(capability, kernel, arguments, options))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
