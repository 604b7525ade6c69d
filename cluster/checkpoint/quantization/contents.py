"""Checks the few small tensors whose numbers decide whether the others can be read. Reads those, and no weight."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Mapping

from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.scheme import NEIGHBOURS, WORD_BITS, Awq, Gptq, Values, num_groups
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.errors import CheckpointError

_LOOKED_AT_BYTES = 4096
_TYPE_CODES = {"I32": "i", "I64": "q"}


def check_contents(refs: Mapping[str, TensorRef | QuantizedRef | Mxfp4Ref]) -> None:
    """Raises CheckpointError, naming file and tensor: a group of inputs that is not there, another shape, a bias, zero
    points where there are said to be none.
    """
    for name, ref in refs.items():
        if not isinstance(ref, QuantizedRef):
            continue
        has_bias = f"{name.removesuffix('weight')}bias" in refs  # the architecture's own
        if (shape := ref.parts.get("shape")) is not None and tuple(_numbers(shape)) != ref.shape:
            raise CheckpointError(
                f"{shape.file}: tensor {shape.name!r} says {tuple(_numbers(shape))}; expected {ref.shape}, "
                f"the shape of {ref.name!r}."
            )
        if (bias := ref.parts.get("bias")) is not None and not has_bias and any(_bytes(bias)):
            raise CheckpointError(f"{bias.file}: tensor {bias.name!r} is not zero; this architecture has none there.")
        if (groups := ref.parts.get("input_groups")) is not None:
            _check_groups(ref, groups)
        if isinstance(ref.scheme, Gptq | Awq) and ref.scheme.symmetric:
            _check_zero_points(ref.scheme, ref.shape[0], ref.parts["zero_points"])
        if isinstance(ref.scheme, Values) and not ref.scheme.zero_points:
            _check_no_zero_points(ref.parts.get("zero_points"))


def _check_zero_points(scheme: Gptq | Awq, out_features: int, zero_points: TensorRef) -> None:
    """Those of the first group: of a file with the wrong label they differ everywhere. Whoever reads all checks all."""
    middle = 2 ** (scheme.bits - 1)
    whole_words = out_features * scheme.bits // WORD_BITS
    found = _bytes(zero_points, whole_words * WORD_BITS // 8)
    # As `gptq` stores them, and as newer writers do that say so.
    for stored in (middle - 1, middle) if scheme.stored_less_one else (middle,):
        octet = stored << 4 | stored if scheme.bits == 4 else stored
        if found == bytes([octet]) * len(found):
            return
    raise CheckpointError(
        f"{zero_points.file}: tensor {zero_points.name!r} has zero points other than {middle}; quantization_config "
        f"says {scheme.SAYS_SYMMETRIC}."
    )


def _check_no_zero_points(zero_points: TensorRef | None) -> None:
    """Older writers store zeros of a symmetric matrix. Whoever reads all checks all."""
    if zero_points is not None and any(_bytes(zero_points, min(zero_points.nbytes, _LOOKED_AT_BYTES))):
        raise CheckpointError(
            f"{zero_points.file}: tensor {zero_points.name!r} has zero points other than 0; quantization_config says "
            "symmetric: true."
        )


def _check_groups(ref: QuantizedRef, groups: TensorRef) -> None:
    end = num_groups(ref.scheme.group_size, ref.shape[1])
    numbers = _numbers(groups)
    lowest, highest = min(numbers), max(numbers)
    if lowest == highest == NEIGHBOURS:
        return
    for wrong in (lowest, highest):
        if not 0 <= wrong < end:
            raise CheckpointError(
                f"{groups.file}: tensor {groups.name!r} says of input {numbers.index(wrong)} that its group is "
                f"{wrong}; there are groups 0 to {end - 1} ({ref.scheme})."
            )


def _numbers(ref: TensorRef) -> array[int]:
    numbers = array(_TYPE_CODES[ref.dtype], _bytes(ref))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bytes(ref: TensorRef, most: int | None = None) -> bytes:
    try:
        with ref.file.open("rb") as file:
            return os.pread(file.fileno(), ref.nbytes if most is None else most, ref.offset)
    except OSError as error:
        raise CheckpointError(f"{ref.file}, which holds {ref.name!r}, cannot be read: {error.strerror}.") from error
