"""Reads and checks the header of one safetensors file. Knows the file format; knows nothing of models.

8 bytes, little-endian    length N of the header
N bytes                   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …}
the rest                  tensor data without holes; offsets count from its start

The library of that name tells no offsets. By them a shard reads its own experts in pieces, and tells how far it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from cluster.checkpoint.json_document import parse_json
from cluster.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own bound

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header, with its place in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by name. Raises CheckpointError when the file is not whole and well-formed."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is truncated or is not a safetensors file: it has {size} bytes and announces a header "
                    f"of {length}."
                )
            entries = parse_json(stream.read(length), f"The header of {file}")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    entries.pop("__metadata__", None)
    tensors = {name: _stored_tensor(file, name, entry, 8 + length) for name, entry in entries.items()}
    _check_extent(file, tensors, 8 + length, size)
    return tensors


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    def malformed(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: the header's entry for tensor {name!r} {what}.")

    if not isinstance(entry, dict):
        raise malformed("is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise malformed(f"has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise malformed("has no shape of 64-bit integers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise malformed("has no pair of data_offsets of 64 bits from 0")
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise malformed(f"spans {end - begin} bytes; expected {prod(shape) * ITEM_BYTES[dtype]} for {dtype} {shape}")
    return StoredTensor(file, dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_extent(file: Path, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Tensors must follow one another without hole or overlap and end where the file ends."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise CheckpointError(f"{file}: tensor {name!r} begins at byte {tensor.offset}; expected {position}.")
        position += tensor.nbytes
        if position > size:
            raise CheckpointError(
                f"{file} is truncated inside tensor {name!r}: the file has {size} bytes and the tensor ends at "
                f"{position}."
            )
    if position != size:
        raise CheckpointError(f"{file} has {size} bytes; expected {position}, where its last tensor ends.")
