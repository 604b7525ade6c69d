"""Where a tensor lies: a contiguous byte range of a file. Knows no model and reads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies, and what is left to do once it is read."""

    name: str  # the hub's
    file: Path
    dtype: str  # as the header spells it: "BF16"
    shape: Shape  # as the model wants it
    offset: int  # bytes from the start of the file
    nbytes: int
    interleaved_heads: int | None = None  # rows of each head alternate (0, h/2, 1, h/2+1, …) and must be sorted out
    transposed: bool = False  # the bytes are those of the [in, out] matrix

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The byte ranges that it is read from."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor that may hold one of the model's: at element `start` of a tensor of exactly this shape."""

    name: str
    shape: Shape
    start: int = 0
    interleaved_heads: int | None = None
    transposed: bool = False

    @property
    def is_part(self) -> bool:
        """Whether the tensor holds the matrices of several experts, one below the other."""
        return len(self.shape) == 3

    def ref(self, name: str, shape: Shape, tensor: StoredTensor) -> TensorRef:
        """What of `tensor` is the model's tensor `name`."""
        item = ITEM_BYTES[tensor.dtype]
        return TensorRef(
            name,
            tensor.file,
            tensor.dtype,
            shape,
            tensor.offset + self.start * item,
            prod(shape) * item,
            self.interleaved_heads,
            self.transposed,
        )
