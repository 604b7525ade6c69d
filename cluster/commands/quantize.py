"""`manta quantize`: writes a checkpoint once more, its matrices rounded, in compressed-tensors' layout.

Memory holds one matrix at a time, as it is and rounded. Other files are copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.rounding import RoundedRef, Rounding
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.checkpoint.weight_files import UNSAFE_SUFFIXES
from cluster.checkpoint.writing.new_model import new_directory, new_file, write_json, write_weights
from cluster.checkpoint.writing.rounded_model import part_names, quantization_config, scale_dtype, stored_units
from cluster.errors import CheckpointError, ConfigError
from experts_service.quantization.pack import stored_parts
from experts_service.quantization.weight import QuantizedWeight
from experts_service.weights import read_tensors

SHARD_BYTES = 5 * 10**9
COPY_BYTES = 16 * 2**20  # at once
_DESCRIPTIONS = ("config.json", "params.json")  # of the plain weights
_OTHERS = (".safetensors", ".index.json", ".gguf", ".py", *UNSAFE_SUFFIXES)  # that are not copied either


def run(model: str, revision: str | None, directory: Path, rounding: Rounding) -> None:
    """Raises ConfigError, CheckpointError, or SetupError where the directory cannot be written."""
    out, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    checkpoint = open_checkpoint(resolve_model(model, revision))
    total = sum(ref.nbytes for ref in checkpoint.tensors.values())
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress, transient=True) as bars:
        bar = bars.add_task("", total=total)
        written = quantize(checkpoint, directory, rounding, on_bytes=lambda n: bars.advance(bar, n))
    size = sum(ref.nbytes for ref in written.tensors.values())
    out.print(f"{model}, {rounding}: {total / 1e9:.2f} GB became {size / 1e9:.2f} GB in {directory}")


def quantize(
    checkpoint: Checkpoint,
    directory: Path,
    rounding: Rounding,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Checkpoint:
    """Write a plain checkpoint rounded, and return what was written."""
    source, directory = checkpoint.directory, directory.absolute()  # another takes the place of the working directory
    if any(isinstance(ref, QuantizedRef) for ref in checkpoint.tensors.values()):
        raise ConfigError(f"{source} is quantised already; take the original")
    if checkpoint.layout != "huggingface":
        raise ConfigError(f"{source} is in Mistral's layout; take the model in Hugging Face's, with config.json")
    rounded = checkpoint.rounded(rounding)
    units = stored_units(rounded)
    nbytes = sum(tensor.nbytes for unit in units.values() for tensor in unit.values())
    with new_directory(directory, nbytes) as partial:
        write_weights(partial, units, lambda name: _content(rounded, name, on_bytes), shard_bytes=shard_bytes)
        _copy_others(source, partial)
        config = JsonDocument.read(source / "config.json").values
        section = quantization_config(checkpoint.architecture, rounding)
        write_json(partial / "config.json", config | {"quantization_config": section})
        open_checkpoint(partial)
    return open_checkpoint(directory)


def _content(checkpoint: Checkpoint, name: str, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, memoryview]]:
    """What is stored of one tensor, by the stored tensors' names."""
    ref = checkpoint.tensors[name]
    if isinstance(ref, RoundedRef):
        weight = read_tensors(checkpoint, [name], dtype=torch.float32, on_bytes=on_bytes)[name]
        assert isinstance(weight, QuantizedWeight), "it is rounded while it is read"
        names = part_names(ref)
        dtype = torch.float32 if scale_dtype(ref) == "F32" else torch.bfloat16
        for role, part in stored_parts(weight, dtype).items():
            yield names[role], part.contiguous().flatten().view(torch.uint8).numpy().data
        return
    assert isinstance(ref, TensorRef), "the checkpoint was plain"
    for piece in _pieces(ref):
        yield name, piece
        on_bytes(len(piece))


def _pieces(ref: TensorRef) -> Iterator[memoryview]:
    """The bytes as they are stored."""
    try:
        with ref.file.open("rb") as file:
            for start in range(0, ref.nbytes, COPY_BYTES):
                length = min(COPY_BYTES, ref.nbytes - start)
                piece = os.pread(file.fileno(), length, ref.offset + start)
                if len(piece) < length:
                    raise CheckpointError(f"{ref.file} ends inside tensor {ref.name!r}; it was whole before.")
                yield memoryview(piece)
    except OSError as error:
        raise CheckpointError(f"{ref.file}, which holds {ref.name!r}, cannot be read: {error.strerror}.") from error


def _copy_others(source: Path, directory: Path) -> None:
    """Tokenizer, template, generation_config.json, licence: all files but code, weights and what describes them."""
    for file in sorted(source.iterdir()):
        name = file.name
        if file.is_file() and name not in _DESCRIPTIONS and not name.startswith(".") and not name.endswith(_OTHERS):
            with file.open("rb") as original, new_file(directory / file.name) as copy:
                shutil.copyfileobj(original, copy)
