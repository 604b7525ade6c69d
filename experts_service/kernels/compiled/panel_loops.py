"""What inner loops over blocks of k have in common, whatever weights are. Knows vectors and scales; multiplies nothing.

A function is made for each kind of weights and each number of rows, once in a module, and the call chooses one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.tile import WIDTH

LANES = 16
Make = Callable[[Any], list[Any]]

if AVAILABLE:
    from llvmlite import ir
    from numba.core import cgutils

    _i16, _i32, _i64, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
    Shorts, Ints, Floats = (ir.VectorType(one, LANES) for one in (_i16, _i32, _f32))
    VECTORS = WIDTH // LANES


def call_one_of(
    builder: Any, kinds: Sequence[int], heights: Sequence[int], arguments: Sequence[Any], function: Callable[..., Any]
) -> None:
    """Call `function(module, kind, height)` of the first two arguments with the others."""
    kind, height, *rest = arguments
    done = builder.append_basic_block("done")
    for of_kind, number in product(kinds, heights):
        wanted, other = (builder.append_basic_block(name) for name in ("wanted", "other"))
        is_wanted = builder.and_(
            builder.icmp_signed("==", kind, integer(of_kind)), builder.icmp_signed("==", height, integer(number))
        )
        builder.cbranch(is_wanted, wanted, other)
        builder.position_at_end(wanted)
        builder.call(function(builder.module, of_kind, number), rest)
        builder.branch(done)
        builder.position_at_end(other)
    builder.branch(done)
    builder.position_at_end(done)


def function_of(module: Any, name: str, num_arguments: int, build: Callable[[Any], None]) -> Any:
    """One for all places of a module that call it: else each compiles its own."""
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * num_arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    build(function)
    return function


class PanelLoops:
    """A function of int64 that is being built: sums of `height` rows, VECTORS of each."""

    def __init__(self, function: Any, height: int) -> None:
        self.function, self.height = function, height
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def phis(self, kind: Any) -> list[list[Any]]:
        """A sum for each row and vector."""
        return [[self.builder.phi(kind) for _ in range(VECTORS)] for _ in range(self.height)]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c of Floats, rounded once."""
        kind = ir.FunctionType(Floats, [Floats] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32")
        return self.builder.call(fma, [a, b, c])

    def store_sums(self, sums: Any, ends: list[list[Any]]) -> None:
        """All of them, row by row, as the last the function does."""
        b = self.builder
        for index, end in enumerate(flat(ends)):
            b.store(end, b.gep(sums, [integer(index)]), align=4)
        b.ret_void()

    def scales(self, are_wide: Any, address: Any, group: Any) -> list[Any]:
        """Of a group of k, float32 or widened bf16, as a flag says when it runs."""
        b, sixteen = self.builder, ir.Constant(Ints, [16] * LANES)

        def widened(group: Any) -> list[Any]:
            return [
                b.bitcast(b.shl(b.zext(one, Ints), sixteen), Floats) for one in self.of_group(address, group, Shorts)
            ]

        return self.either(are_wide, group, lambda group: self.of_group(address, group, Floats), widened)

    def either(self, flag: Any, group: Any, if_set: Make, otherwise: Make) -> list[Any]:
        """The vectors of a group that either of two makes, as a flag says when it runs."""
        b = self.builder
        names = ("set", "otherwise", "either")
        first, second, either = (self.function.append_basic_block(name) for name in names)
        b.cbranch(b.icmp_signed("!=", flag, integer(0)), first, second)
        made = []
        for block, make in ((first, if_set), (second, otherwise)):
            b.position_at_end(block)
            made.append((make(group), b.block))
            b.branch(either)
        b.position_at_end(either)
        vectors = []
        for vector in range(VECTORS):
            phi = b.phi(made[0][0][vector].type)
            for of_block, block in made:
                phi.add_incoming(of_block[vector], block)
            vectors.append(phi)
        return vectors

    def of_group(self, address: Any, group: Any, kind: Any) -> list[Any]:
        """The vectors that lie at an address for a group."""
        b = self.builder
        at, first = self.pointer(address, kind), b.mul(group, integer(VECTORS))
        return [b.load(b.gep(at, [b.add(first, integer(vector))]), align=2) for vector in range(VECTORS)]


def flat(of_rows: list[list[Any]]) -> list[Any]:
    """Those of all rows, one after the other."""
    return [one for of_row in of_rows for one in of_row]


def integer(value: int) -> Any:
    """A constant int64."""
    return ir.Constant(_i64, value)
