"""Which matrices of a plain checkpoint are rounded to small numbers while they are read, and to which. Rounds nothing.

The gate, norms, embeddings and the output head stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.tensor_ref import TensorRef

Parts = Literal["all", "experts", "attention"]

# A dense layer's feed-forward network counts as experts.
_MATRICES = {
    "experts": re.compile(r"model\.layers\.\d+\.(block_sparse_moe\.experts\.\d+\.w[123]|mlp\.\w+_proj)\.weight"),
    "attention": re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight"),
}


@dataclass(frozen=True, slots=True)
class Rounding:
    """To integers of 8 or 4 bits, each group of neighbouring inputs with a scale."""

    bits: int
    group_size: int
    parts: Parts

    def applies_to(self, name: str) -> bool:
        """Whether a tensor is rounded, by the hub's name."""
        return any(
            matrices.fullmatch(name) is not None for part, matrices in _MATRICES.items() if self.parts in ("all", part)
        )

    def __str__(self) -> str:
        return f"INT{self.bits}, groups of {self.group_size}"


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
