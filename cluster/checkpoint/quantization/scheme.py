"""How one matrix [out, in] is stored in small numbers: its parts with their dtypes and shapes. Knows no file, no model.

compressed-tensors, fp8    weight [out, in], a code each; weight_scale of blocks of outputs and inputs
compressed-tensors, packed weight_packed [out, in·bits / 32], int32, the first code in the lowest bits
GPTQ                       qweight [in·bits / 32, out], qzeros [groups, out·bits / 32], scales [groups, out]
AWQ                        qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from cluster.checkpoint.architecture import Shape

Role = Literal["codes", "scales", "zero_points", "input_groups", "shape", "bias"]
READ: tuple[Role, ...] = ("codes", "scales", "zero_points", "input_groups")  # the others are looked at once
Block = tuple[int | None, int | None]  # outputs and inputs that share a scale; None: all

WORD_BITS = 32  # codes are packed into int32
NEIGHBOURS = -1  # in place of the groups of inputs, for all of them: they are neighbours, as without such a tensor
FLOAT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that make up a matrix."""

    role: Role
    suffix: str  # in place of "weight" in the matrix's own name
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]  # any of these; the first is what a message says
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Values:
    """A number for each weight, under the weight's own name."""

    bits: int
    is_float: bool  # F8_E4M3, else I8
    block: Block
    zero_points: bool = False
    scale_suffix: str = "weight_scale"

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: all."""
        return self.block[1]

    def parts(self, out_features: int, in_features: int) -> Iterator[Part]:
        """What a matrix of that shape is stored in."""
        of_scales = scale_shapes(self.block, out_features, in_features)
        scale_dtypes = (*FLOAT_DTYPES, "F8_E8M0") if self.is_float else FLOAT_DTYPES
        yield Part("codes", "weight", ("F8_E4M3",) if self.is_float else ("I8",), ((out_features, in_features),))
        yield Part("scales", self.scale_suffix, scale_dtypes, of_scales)
        yield Part("zero_points", "weight_zero_point", ("I8",), of_scales, needed=self.zero_points)

    def __str__(self) -> str:
        return f"{'FP8' if self.is_float else f'INT{self.bits}'}, {_of_block(self.block)}"


@dataclass(frozen=True, slots=True)
class Packed:
    """compressed-tensors' pack-quantized: rows of int32."""

    bits: int
    block: Block
    zero_points: bool
    act_order: bool

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: all."""
        return self.block[1]

    @property
    def packs_zero_points(self) -> bool:
        """Along the outputs, which they can only be where each output has its own."""
        return self.block[0] == 1

    def parts(self, out_features: int, in_features: int) -> Iterator[Part]:
        """What a matrix of that shape is stored in."""
        of_scales = scale_shapes(self.block, out_features, in_features)
        groups = of_scales[0][-1] if of_scales[0] else 1
        yield Part("codes", "weight_packed", ("I32",), ((out_features, words(in_features, self.bits)),))
        yield Part("scales", "weight_scale", FLOAT_DTYPES, of_scales)
        if self.zero_points and self.packs_zero_points:
            yield Part("zero_points", "weight_zero_point", ("I32",), ((words(out_features, self.bits), groups),))
        elif self.zero_points:
            yield Part("zero_points", "weight_zero_point", ("I8",), of_scales)
        if self.act_order:
            yield Part("input_groups", "weight_g_idx", ("I32", "I64"), ((in_features,),))
        yield Part("shape", "weight_shape", ("I64", "I32"), ((2,),))

    def __str__(self) -> str:
        return f"{self.bits} bits packed, {_of_block(self.block)}"


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ's columns of int32."""

    SAYS_SYMMETRIC: ClassVar[str] = "sym: true"

    bits: int
    group_size: int | None  # inputs; None: all
    act_order: bool
    symmetric: bool  # every zero point is the middle one
    stored_less_one: bool  # checkpoint_format gptq: zero points are stored less 1; gptq_v2: as they are

    def parts(self, out_features: int, in_features: int) -> Iterator[Part]:
        """What a matrix of that shape is stored in."""
        groups = num_groups(self.group_size, in_features)
        yield Part("codes", "qweight", ("I32",), ((words(in_features, self.bits), out_features),))
        yield Part("scales", "scales", FLOAT_DTYPES, ((groups, out_features),))
        yield Part("zero_points", "qzeros", ("I32",), ((groups, words(out_features, self.bits)),))
        yield Part("input_groups", "g_idx", ("I32", "I64"), ((in_features,),), needed=self.act_order)
        yield _bias(out_features)

    def __str__(self) -> str:
        return f"GPTQ of {self.bits} bits, {_of_block((1, self.group_size))}"


@dataclass(frozen=True, slots=True)
class Awq:
    """AutoAWQ's gemm layout: eight neighbouring outputs in an int32, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    SAYS_SYMMETRIC: ClassVar[str] = "zero_point: false"

    group_size: int | None  # inputs; None: all
    bits: int = 4
    symmetric: bool = False  # every zero point is the middle one
    stored_less_one: ClassVar[bool] = False

    def parts(self, out_features: int, in_features: int) -> Iterator[Part]:
        """What a matrix of that shape is stored in."""
        groups, packed = num_groups(self.group_size, in_features), words(out_features, self.bits)
        yield Part("codes", "qweight", ("I32",), ((in_features, packed),))
        yield Part("scales", "scales", FLOAT_DTYPES, ((groups, out_features),))
        yield Part("zero_points", "qzeros", ("I32",), ((groups, packed),))
        yield _bias(out_features)

    def __str__(self) -> str:
        return f"AWQ of {self.bits} bits, {_of_block((1, self.group_size))}"


Scheme = Values | Packed | Gptq | Awq


def words(numbers: int, bits: int) -> int:
    """The int32 that so many numbers of so many bits are packed in."""
    return -(-numbers * bits // WORD_BITS)


def num_groups(size: int | None, features: int) -> int:
    """Groups of that size that cover the features; the last may have fewer."""
    return 1 if size is None else -(-features // size)


def scale_shapes(block: Block, out_features: int, in_features: int) -> tuple[Shape, ...]:
    """How the scales of a matrix may be shaped."""
    grid = num_groups(block[0], out_features), num_groups(block[1], in_features)
    if block == (None, None):
        return ((1,), (), grid)
    return (grid, grid[:1]) if block == (1, None) else (grid,)


def _bias(out_features: int) -> Part:
    """AutoGPTQ wrote one of zeros for a module that has none."""
    return Part("bias", "bias", FLOAT_DTYPES, ((out_features,),), needed=False)


def _of_block(block: Block) -> str:
    """For a message."""
    outputs, inputs = block
    if outputs == 1:
        return "a scale for each output" if inputs is None else f"a scale for each group of {inputs} inputs"
    if block == (None, None):
        return "one scale"
    return f"a scale for each block of {outputs or 'all'} outputs and {inputs or 'all'} inputs"
