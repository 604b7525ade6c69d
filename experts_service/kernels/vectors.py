"""Vectors of sixteen float32 that kernels keep in registers, by name. Knows no kernel.

A loop that the compiler vectorises sums in whatever way it finds; these are the lanes themselves, so that a kernel says
which sums wait for each other, and in which order its numbers are added. Where a CPU's registers are shorter a vector
is two or four of them. Offsets count elements of an array in one dimension, and are not checked.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import register_default
from numba.extending import intrinsic, models

LANES = 16

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTE = ir.PointerType(ir.IntType(8))
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_default(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


_vector = _Vector()


def _all(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _all_ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])


def _spread(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _all_ints(0))


def _widened(builder: Any, shorts: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(shorts, _INTS), _all_ints(16)), _FLOATS)


def _narrowed(builder: Any, vector: Any) -> Any:
    bits = builder.bitcast(vector, _INTS)
    lowest_kept = builder.and_(builder.lshr(bits, _all_ints(16)), _all_ints(1))
    rounded = builder.lshr(builder.add(bits, builder.add(lowest_kept, _all_ints(0x7FFF))), _all_ints(16))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.trunc(builder.select(is_nan, _all_ints(0x7FC0), rounded), _SHORTS)


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, array: Any, _offset: Any) -> Any:
    """Sixteen numbers of an array of float32, or of uint16, which are bits of bf16 and widened."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        if array.dtype == types.float32:
            return builder.load(builder.bitcast(address, _FLOATS.as_pointer()), align=4)
        return _widened(builder, builder.load(builder.bitcast(address, _SHORTS.as_pointer()), align=2))

    return _vector(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def fetch(_context: Any, array: Any, _offset: Any) -> Any:
    """Have an element's cache line brought nearer, to the second level; nothing waits for it. Any offset will do."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.bitcast(_address(context, builder, signature.args[0], *arguments), _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, *[ir.IntType(32)] * 3])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, locality, data = (ir.Constant(ir.IntType(32), value) for value in (0, 2, 1))
        builder.call(prefetch, [address, read, locality, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def store(_context: Any, array: Any, _offset: Any, _value: Any) -> Any:
    """Write sixteen numbers to an array of float32, or of uint16 as the nearest bf16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        if array.dtype == types.float32:
            builder.store(arguments[2], builder.bitcast(address, _FLOATS.as_pointer()), align=4)
        else:
            builder.store(_narrowed(builder, arguments[2]), builder.bitcast(address, _SHORTS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def spread(_context: Any, array: Any, _offset: Any) -> Any:
    """One number of an array of float32, in all lanes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, builder.load(_address(context, builder, signature.args[0], *arguments), align=4))

    return _vector(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def splat(_context: Any, _value: Any) -> Any:
    """A float32 in all lanes."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0])

    return _vector(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a · b + c, rounded once."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _fma(builder, *arguments)

    return _vector(_vector, _vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply(_context: Any, _a: Any, _b: Any) -> Any:
    """a · b."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def divide(_context: Any, _a: Any, _b: Any) -> Any:
    """a / b."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def add(_context: Any, _a: Any, _b: Any) -> Any:
    """a + b."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def rounded(_context: Any, _value: Any) -> Any:
    """Each lane as the nearest bf16."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _widened(builder, _narrowed(builder, arguments[0]))

    return _vector(_vector), build


@intrinsic  # type: ignore[untyped-decorator]
def larger(_context: Any, _a: Any, _b: Any) -> Any:
    """Of each lane the larger one; b where a is NaN."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def largest(_context: Any, _value: Any) -> Any:
    """The largest lane, as a float32."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        def of_two(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _halved(builder, arguments[0], of_two)

    return types.float32(_vector), build


@intrinsic  # type: ignore[untyped-decorator]
def total(_context: Any, _value: Any) -> Any:
    """The sum of all lanes as a float32, in one order: halves are added to each other until one number is left."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _halved(builder, arguments[0], builder.fadd)

    return types.float32(_vector), build


def _halved(builder: Any, vector: Any, of_two: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        other = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [(i + width) % LANES for i in range(LANES)])
        vector = of_two(vector, builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), other))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


_MAGIC = 12582912.0  # 1.5 · 2**23: what is added to it is rounded to an integer, in the lowest bits
_LEAST_EXPONENT = -126.0  # below it the result is 0
_TERMS = [math.log(2) ** k / math.factorial(k) for k in range(8)]  # of 2**f; the next is 5e-9 at |f| = 1/2


@intrinsic  # type: ignore[untyped-decorator]
def exp2_below(_context: Any, _value: Any, _bound: Any) -> Any:
    """2 ** (value - bound), to a unit in the last place or so; 0 where that is below 2 ** -126. NaN stays NaN.

    `value` is at most `bound`.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x = builder.fsub(*arguments)
        shifted = builder.fadd(x, _all(_MAGIC))
        fraction = builder.fsub(x, builder.fsub(shifted, _all(_MAGIC)))  # -1/2 … 1/2
        result = _all(_TERMS[-1])
        for term in reversed(_TERMS[:-1]):
            result = _fma(builder, result, fraction, _all(term))
        exponent = builder.shl(builder.bitcast(shifted, _INTS), _all_ints(23))
        scaled = builder.bitcast(builder.add(builder.bitcast(result, _INTS), exponent), _FLOATS)
        is_nan = builder.fcmp_unordered("uno", x, x)
        small = builder.select(builder.fcmp_ordered("<", x, _all(_LEAST_EXPONENT)), _all(0.0), scaled)
        return builder.select(is_nan, x, small)

    return _vector(_vector, _vector), build
