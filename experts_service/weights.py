"""Reads tensors of a checkpoint into memory, only the byte ranges asked for. Knows nothing of layers or experts.

What is quantised stays so, and what is to be rounded is rounded here. transformers' code multiplies with plain
numbers only: for that, what is quantised is widened here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.rounding import RoundedRef
from cluster.checkpoint.quantization.scheme import READ
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.errors import CheckpointError
from experts_service.memory import mapped
from experts_service.quantization.microscaled import widen_mxfp4
from experts_service.quantization.rounding import rounded
from experts_service.quantization.unpack import quantized_weight
from experts_service.quantization.weight import Weight

CHUNK_BYTES = 16 * 2**20  # of one read; progress is told after each

_TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read_tensors(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Weight]:
    """The named tensors, contiguous, in `dtype` on `device`, in the order of `names`.

    `on_bytes` is called with the number of bytes of each read; they add up to the tensors' `nbytes`. Raises
    CheckpointError, naming file and tensor, where a file has changed since the checkpoint was opened.
    """
    refs = {name: checkpoint.tensors[name] for name in names}
    tensors: dict[str, Weight] = {}
    with ExitStack() as stack:
        files: dict[Path, int] = {}

        def read(ref: TensorRef) -> torch.Tensor:
            if ref.file not in files:
                files[ref.file] = _open(ref)
                stack.callback(os.close, files[ref.file])
            return _arranged(_read(files[ref.file], ref, on_bytes), ref)

        for name, ref in sorted(refs.items(), key=lambda item: (str(item[1].stored[0].file), item[1].stored[0].offset)):
            if isinstance(ref, QuantizedRef):
                parts = {role: read(ref.parts[role]) for role in READ if role in ref.parts}
                tensors[name] = quantized_weight(name, ref.shape, ref.scheme, parts, dtype).to(device)
                continue
            tensor = read(ref.stored[0])
            if isinstance(ref, RoundedRef):
                tensors[name] = rounded(tensor, ref.rounding.scheme, dtype).to(device)
                continue
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                tensor = mapped(tensor.numel() * dtype.itemsize).view(dtype).view(tensor.shape).copy_(tensor)
            tensors[name] = tensor.to(device)
    return {name: tensors[name] for name in refs}


def read_widened(
    ref: TensorRef | QuantizedRef | Mxfp4Ref, dtype: torch.dtype, on_bytes: Callable[[int], None] | None = None
) -> torch.Tensor:
    """One tensor, in `dtype` where it is stored in fewer bits, else as it is stored. From any thread.

    Each number is computed in fp32 and rounded once. Raises CheckpointError.
    """
    if isinstance(ref, TensorRef):
        return read_stored(ref, on_bytes)
    if isinstance(ref, QuantizedRef):
        parts = {role: read_stored(ref.parts[role], on_bytes) for role in READ if role in ref.parts}
        return quantized_weight(ref.name, ref.shape, ref.scheme, parts, dtype).dequantize(dtype)
    whole = mapped(prod(ref.shape) * dtype.itemsize).view(dtype).view(ref.shape)
    for expert, out in enumerate(whole):
        codes, scales = (read_stored(part, on_bytes)[0] for part in ref.of_expert(expert).stored)
        widen_mxfp4(ref.name, codes, scales, out)
    return whole


def read_stored(ref: TensorRef, on_bytes: Callable[[int], None] | None = None) -> torch.Tensor:
    """One tensor as it is stored, in a new memory of its own. From any thread. Raises CheckpointError."""
    file = _open(ref)
    try:
        return _read(file, ref, on_bytes).view(ref.shape)
    finally:
        os.close(file)


def _open(ref: TensorRef) -> int:
    try:
        return os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{ref.file}, which holds {ref.name!r}, cannot be read: {error.strerror}.") from error


def _read(file: int, ref: TensorRef, on_bytes: Callable[[int], None] | None) -> torch.Tensor:
    """The bytes as they are stored, flat."""
    stored = mapped(ref.nbytes)
    view = stored.numpy().data
    done = 0
    while done < ref.nbytes:
        try:
            count = os.preadv(file, [view[done : done + CHUNK_BYTES]], ref.offset + done)
        except OSError as error:
            raise CheckpointError(f"{ref.file}: reading tensor {ref.name!r} failed: {error.strerror}.") from error
        if count == 0:
            raise CheckpointError(
                f"{ref.file} ends inside tensor {ref.name!r}, after {done} of its {ref.nbytes} bytes; the file has "
                "shrunk since it was checked."
            )
        done += count
        if on_bytes is not None:
            on_bytes(count)
    return stored.view(_TORCH_DTYPES[ref.dtype])


def _arranged(stored: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """The tensor in the shape and row order that the model wants; a view where that is possible."""
    if ref.transposed:
        rows, columns = ref.shape
        return stored.view(columns, rows).t()
    if ref.interleaved_heads is None:
        return stored.view(ref.shape)
    # Rows of a head are stored as pairs (0, h/2), (1, h/2+1), …; the model rotates the first half against the second.
    rows, columns = ref.shape
    pairs = stored.view(ref.interleaved_heads, -1, 2, columns)  # [heads, head_dim / 2, 2, D]
    return pairs.transpose(1, 2).reshape(rows, columns)
