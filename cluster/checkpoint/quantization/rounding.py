"""Which matrices of a plain checkpoint are rounded to small numbers while they are read, and to which. Rounds nothing.

The gate, norms and embeddings stay as they are. The output head, which is read whole in each step, is of 8 bits where
experts and attention are integers: 4 would move the choice among tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.quantization.scheme import Packed, Values
from cluster.checkpoint.tensor_ref import TensorRef

Numbers = Literal["int8", "int4", "fp8"]
Parts = Literal["all", "layers", "experts", "attention"]  # layers: experts and attention; all: the output head as well

_HEAD = "lm_head.weight"
# A dense layer's feed-forward network counts as experts, and so does a shared expert.
_MATRICES = {
    "experts": re.compile(
        r"model\.layers\.\d+\.(block_sparse_moe\.experts\.\d+\.w[123]|mlp\.(shared_expert\.)?\w+_proj)\.weight"
    ),
    "attention": re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight"),
}


@dataclass(frozen=True, slots=True)
class Rounding:
    """To integers of 8 or 4 bits, each group of neighbouring inputs with a scale, or to FP8 with a scale an output."""

    numbers: Numbers
    group_size: int | None  # None: all inputs, as of FP8
    parts: Parts

    @classmethod
    def to(cls, numbers: Numbers, group_size: int, parts: Parts) -> Rounding:
        """`group_size` is that of integers."""
        return cls(numbers, None if numbers == "fp8" else group_size, parts)

    @property
    def scheme(self) -> Packed | Values:
        """How a file stores such a matrix."""
        block = (1, self.group_size)
        if self.numbers == "fp8":
            return Values(8, is_float=True, block=block)
        return Packed(8 if self.numbers == "int8" else 4, block, zero_points=False, act_order=False)

    def of(self, name: str) -> Rounding | None:
        """What a tensor is rounded to, by the hub's name; None: it stays as it is."""
        if name == _HEAD:
            return replace(self, numbers="int8") if self.parts == "all" and self.numbers != "fp8" else None
        matrices = (names for part, names in _MATRICES.items() if self.has(part))
        return self if any(names.fullmatch(name) for names in matrices) else None

    def has(self, part: str) -> bool:
        """Whether matrices of `experts` or of `attention` are rounded."""
        return self.parts in ("all", "layers", part)

    def __str__(self) -> str:
        of = "a scale for each output" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.numbers.upper()}, {of}"


@dataclass(frozen=True, slots=True)
class RoundedRef:
    """A plain matrix that is rounded once it is read."""

    plain: TensorRef
    rounding: Rounding

    @property
    def name(self) -> str:
        """The hub's."""
        return self.plain.name

    @property
    def shape(self) -> Shape:
        """[out, in]."""
        return self.plain.shape

    @property
    def nbytes(self) -> int:
        """Of what is read of it."""
        return self.plain.nbytes

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The byte ranges that it is read from."""
        return (self.plain,)
