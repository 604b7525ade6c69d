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

from experts_service.kernels.compiled.tile import BFloat

LANES = 16

FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTE = ir.PointerType(ir.IntType(8))
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_default(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


VECTOR = _vector = _Vector()  # numba's type of one


def _all(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def _all_ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def fma_of(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, as LLVM's instruction."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _address(context: Any, builder: Any, kind: Any, numbers: Any, offset: Any) -> Any:
    first = numbers if isinstance(kind, types.CPointer) else context.make_array(kind)(context, builder, numbers).data  # type: ignore[attr-defined]
    return builder.gep(first, [offset])


def spread_of(builder: Any, value: Any) -> Any:
    """A float32 in all lanes, as LLVM's instructions."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _all_ints(0))


def _widened(builder: Any, shorts: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(shorts, _INTS), _all_ints(16)), FLOATS)


def _narrowed(builder: Any, vector: Any) -> Any:
    bits = builder.bitcast(vector, _INTS)
    lowest_kept = builder.and_(builder.lshr(bits, _all_ints(16)), _all_ints(1))
    rounded = builder.lshr(builder.add(bits, builder.add(lowest_kept, _all_ints(0x7FFF))), _all_ints(16))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.trunc(builder.select(is_nan, _all_ints(0x7FC0), rounded), _SHORTS)


@intrinsic  # type: ignore[untyped-decorator]
def numbers(_context: Any, _address: Any, kind: Any) -> Any:
    """The numbers of a kind at an address, int64. They can be indexed; unlike an array's nobody counts who has them."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), build  # type: ignore[attr-defined]


@intrinsic  # type: ignore[untyped-decorator]
def address_of(_context: Any, at: Any) -> Any:
    """Where `numbers` begin, int64."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(at), build


@intrinsic  # type: ignore[untyped-decorator]
def pair_of(_context: Any, kind: Any) -> Any:
    """How many numbers of a kind are 32 bits."""

    def build(_target: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), 32 // kind.dtype.bitwidth)

    return types.intp(kind), build


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, at: Any, _offset: Any) -> Any:
    """Sixteen numbers, float32, or uint16, which are bits of bf16 and widened."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        if at.dtype == types.float32:
            return builder.load(builder.bitcast(address, FLOATS.as_pointer()), align=4)
        return _widened(builder, builder.load(builder.bitcast(address, _SHORTS.as_pointer()), align=2))

    return _vector(at, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def load_integers(_context: Any, at: Any, _offset: Any) -> Any:
    """Sixteen int32, which lie where float32 are kept, as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.sitofp(builder.load(builder.bitcast(address, _INTS.as_pointer()), align=4), FLOATS)

    return _vector(at, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def store(_context: Any, at: Any, _offset: Any, _value: Any) -> Any:
    """Write sixteen numbers as float32, or as the bits of the nearest bf16, uint16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        if at.dtype == types.float32:
            builder.store(arguments[2], builder.bitcast(address, FLOATS.as_pointer()), align=4)
        else:
            builder.store(_narrowed(builder, arguments[2]), builder.bitcast(address, _SHORTS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(at, types.intp, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def spread(_context: Any, at: Any, _offset: Any) -> Any:
    """One float32 in all lanes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread_of(builder, builder.load(_address(context, builder, signature.args[0], *arguments), align=4))

    return _vector(at, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def splat(_context: Any, _value: Any) -> Any:
    """A float32 in all lanes."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return spread_of(builder, arguments[0])

    return _vector(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a · b + c, rounded once."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return fma_of(builder, *arguments)

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
def rounded_number(_context: Any, _value: Any) -> Any:
    """The same in two thirds of the instructions. What is no number stays so if its lowest 16 bits are 0."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _INTS)
        lowest_kept = builder.and_(builder.lshr(bits, _all_ints(16)), _all_ints(1))
        sums = builder.add(bits, builder.add(lowest_kept, _all_ints(0x7FFF)))
        return builder.bitcast(builder.and_(sums, _all_ints(-0x10000)), FLOATS)

    return _vector(_vector), build


@intrinsic  # type: ignore[untyped-decorator]
def store_rounded(_context: Any, at: Any, _offset: Any, _value: Any) -> Any:
    """Write sixteen numbers that are bf16 already as its bits, uint16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        shorts = builder.trunc(builder.lshr(builder.bitcast(arguments[2], _INTS), _all_ints(16)), _SHORTS)
        builder.store(shorts, builder.bitcast(address, _SHORTS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(at, types.intp, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def larger(_context: Any, _a: Any, _b: Any) -> Any:
    """Of each lane the larger one; b where a is NaN."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def is_any_above(_context: Any, _a: Any, _b: Any) -> Any:
    """Whether a lane of a is larger than b's; NaN is not."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = builder.bitcast(builder.fcmp_ordered(">", *arguments), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", lanes, ir.Constant(lanes.type, 0))

    return types.boolean(_vector, _vector), build


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
        vector = of_two(vector, builder.shuffle_vector(vector, ir.Constant(FLOATS, ir.Undefined), other))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


_MAGIC = 12582912.0  # 1.5 · 2**23: what is added to it is rounded to an integer, in the lowest bits
_LEAST_EXPONENT = -126.0  # below it the result is 0
_VANISHES = -150.0  # what 2 to the power of is 0 as a bf16, whose smallest is flushed
_SHORT = 6  # terms for a bf16
_TERMS = [math.log(2) ** k / math.factorial(k) for k in range(8)]  # of 2**f; the next is 5e-9 at |f| = 1/2


def _exp2(builder: Any, value: Any, bound: Any) -> Any:
    x = builder.fsub(value, bound)
    shifted = builder.fadd(x, _all(_MAGIC))
    fraction = builder.fsub(x, builder.fsub(shifted, _all(_MAGIC)))  # -1/2 … 1/2
    result = _all(_TERMS[-1])
    for term in reversed(_TERMS[:-1]):
        result = fma_of(builder, result, fraction, _all(term))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _all_ints(23))
    scaled = builder.bitcast(builder.add(builder.bitcast(result, _INTS), exponent), FLOATS)
    is_nan = builder.fcmp_unordered("uno", x, x)
    small = builder.select(builder.fcmp_ordered("<", x, _all(_LEAST_EXPONENT)), _all(0.0), scaled)
    return builder.select(is_nan, x, small)


@intrinsic  # type: ignore[untyped-decorator]
def exp2_below(_context: Any, _value: Any, _bound: Any) -> Any:
    """2 ** (value - bound), to a unit in the last place or so; 0 where that is below 2 ** -126. NaN stays NaN.

    `value` is at most `bound`.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _exp2(builder, *arguments)

    return _vector(_vector, _vector), build


@intrinsic  # type: ignore[untyped-decorator]
def weigh(_context: Any, into: Any, _offset: Any, _score: Any, _scale: Any, _bound: Any) -> Any:
    """Write 2 ** (score · scale - bound) and return what was written. NaN stays NaN; far below 1 it is 0.

    As float32 it is `exp2_below`. As bf16, uint16, it is what the CPU's own instructions make of a shorter polynomial
    (AVX512-BF16): off by 3e-6 before it is rounded to 8 bits.
    """

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at, offset, score, scale, bound = arguments
        address = builder.gep(at, [offset])
        if into.dtype == types.float32:
            weight = _exp2(builder, builder.fmul(score, scale), bound)
            builder.store(weight, builder.bitcast(address, FLOATS.as_pointer()), align=4)
            return weight
        x = fma_of(builder, score, scale, builder.fneg(bound))
        x = builder.select(builder.fcmp_ordered("<", x, _all(_VANISHES)), _all(_VANISHES), x)
        whole = builder.call(_function(builder, "llvm.nearbyint.v16f32", FLOATS, [FLOATS]), [x])
        fraction = builder.fsub(x, whole)
        result = _all(_TERMS[_SHORT - 1])
        for term in reversed(_TERMS[: _SHORT - 1]):
            result = fma_of(builder, result, fraction, _all(term))
        lanes, rounding = ir.IntType(16), ir.IntType(32)
        scaled = builder.call(
            _function(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, [FLOATS] * 3 + [lanes, rounding]),
            [result, whole, result, ir.Constant(lanes, -1), ir.Constant(rounding, 4)],
        )
        kind = ir.VectorType(BFloat(), LANES)
        rounded = builder.call(_function(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind, [FLOATS]), [scaled])
        shorts = builder.bitcast(rounded, _SHORTS)
        builder.store(shorts, builder.bitcast(address, _SHORTS.as_pointer()), align=2)
        return _widened(builder, shorts)

    return _vector(into, types.intp, _vector, _vector, _vector), build


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
