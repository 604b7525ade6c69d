"""Finds the parts of one quantised matrix among the stored tensors and checks them. Knows headers; reads no file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.quantization.scheme import READ, Awq, Gptq, Part, Role, Scheme, Values
from cluster.checkpoint.safetensors_header import StoredTensor
from cluster.checkpoint.tensor_ref import Source, TensorRef
from cluster.errors import CheckpointError

# Of activations and of the KV cache, which Manta does not quantise.
_UNUSED = re.compile(
    r"(^|\.)((input|output|q|k|v)_(scale|zero_point)|act_scale|kv_scale|(\w+_)?activation_scale)$", re.ASCII
)


@dataclass(frozen=True, slots=True)
class QuantizedRef:
    """Where the parts of one quantised matrix lie."""

    name: str  # the hub's, of the matrix
    shape: Shape  # [out, in]
    scheme: Scheme
    parts: Mapping[Role, TensorRef]

    @property
    def nbytes(self) -> int:
        """Of what is read of it."""
        return sum(self.parts[role].nbytes for role in READ if role in self.parts)

    @property
    def has_zero_points(self) -> bool:
        """Whether some may be other than the middle."""
        return "zero_points" in self.parts and not (isinstance(self.scheme, Gptq | Awq) and self.scheme.symmetric)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The byte ranges that it is read from."""
        return tuple(self.parts.values())


def locate_quantized(
    name: str, shape: Shape, schemes: Sequence[Scheme], sources: Sequence[Source], stored: Mapping[str, StoredTensor]
) -> QuantizedRef | None:
    """The matrix where it is stored in one of the schemes, else None.

    `sources` are the tensors that may hold it unquantised: parts are named after them. Raises CheckpointError, which
    names file and tensor, where a part is missing, of another shape or of another dtype.
    """
    found = [
        (scheme, source)
        for scheme in schemes
        for source in sources
        if _holds_codes(scheme, source, _first(scheme, shape), stored)
    ]
    if not found:
        return None
    # Two schemes may differ in the name of the scales only.
    complete = [(scheme, source) for scheme, source in found if _scales(scheme, source, shape) in stored]
    scheme, source = (complete or found)[0]
    codes = stored[codes_name(scheme, shape, source)]
    rows = scheme.block[0] if isinstance(scheme, Values) else None
    if source.is_part and source.shape[1] > shape[0] and rows is not None and shape[0] % rows:
        raise CheckpointError(
            f"{codes.file}: tensor {source.name!r} has matrices of {shape[0]} rows one below the other, and blocks of "
            f"{rows} would lie in two of them ({scheme}); save the experts as tensors of their own."
        )
    parts: dict[Role, TensorRef] = {}
    for part in scheme.parts(*shape):
        part_name = _part_name(source, part)
        if part_name in stored:
            parts[part.role] = _ref(part_name, part, _slice(source, shape, part), stored[part_name], scheme)
        elif part.needed:
            raise CheckpointError(
                f"{codes.file} has {codes_name(scheme, shape, source)!r} and no file has {part_name!r}; expected "
                f"one of dtype {' or '.join(part.dtypes)} and shape {part.shapes[0]} ({scheme})."
            )
    return QuantizedRef(name, shape, scheme, parts)


def is_unused(name: str) -> bool:
    """Whether a tensor beside quantised weights changes nothing here."""
    return _UNUSED.search(name) is not None


def codes_name(scheme: Scheme, shape: Shape, source: Source) -> str:
    """The tensor that holds the numbers of a matrix."""
    return _part_name(source, _first(scheme, shape))


def _holds_codes(scheme: Scheme, source: Source, codes: Part, stored: Mapping[str, StoredTensor]) -> bool:
    tensor = stored.get(_part_name(source, codes))
    if tensor is None or (source.is_part and not isinstance(scheme, Values)):
        return False
    # Under the weight's own name the dtype says whether it is quantised.
    return not isinstance(scheme, Values) or tensor.dtype in codes.dtypes


def _first(scheme: Scheme, shape: Shape) -> Part:
    return next(scheme.parts(*shape))


def _scales(scheme: Scheme, source: Source, shape: Shape) -> str:
    return next(_part_name(source, part) for part in scheme.parts(*shape) if part.role == "scales")


def _part_name(source: Source, part: Part) -> str:
    """`w1.weight_scale` beside `w1.weight`, and `gate_up_proj_scale` beside `gate_up_proj`."""
    if source.name.endswith(".weight"):
        return source.name.removesuffix("weight") + part.suffix
    return source.name + part.suffix.removeprefix("weight")


def _slice(source: Source, shape: Shape, part: Part) -> tuple[Source, ...]:
    """The tensors that may hold the part, with where in them."""
    if not source.is_part:
        return tuple(Source(source.name, of_part) for of_part in part.shapes)
    # Of the experts of a layer, one below the other: [E, k·out, in] has their scales in [E, k·rows, columns].
    grid = next(of_part for of_part in reversed(part.shapes) if len(of_part) == 2)
    experts, stacked = source.shape[0], source.shape[1] // shape[0]
    whole = (experts, stacked * grid[0], grid[1])
    return (Source(source.name, whole, source.start // prod(shape) * prod(grid)),)


def _ref(name: str, part: Part, sources: Sequence[Source], tensor: StoredTensor, scheme: Scheme) -> TensorRef:
    source = next((source for source in sources if source.shape == tensor.shape), None)
    if source is None:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} has shape {tensor.shape}; expected {sources[0].shape} ({scheme})."
        )
    if tensor.dtype not in part.dtypes:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; expected {' or '.join(part.dtypes)} ({scheme})."
        )
    shape = source.shape if source.shape in part.shapes else next(s for s in reversed(part.shapes) if len(s) == 2)
    return source.ref(name, shape, tensor)
