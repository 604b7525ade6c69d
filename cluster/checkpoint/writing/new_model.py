"""Writes a model directory piece by piece; it appears whole or not at all. Knows files and sizes; computes no weight.

Everything is written to a folder beside it, which is renamed at the end. What a killed process has left there is
cleared away by the next one.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.safetensors_header import ITEM_BYTES
from cluster.errors import SetupError

SPARE_BYTES = 64 * 2**20  # for tokenizer, headers and the file system itself


@dataclass(frozen=True, slots=True)
class NewTensor:
    """One tensor of a file that is written."""

    dtype: str  # as the header spells it: "BF16"
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Unit = Mapping[str, NewTensor]  # tensors by name that are made together


@contextmanager
def new_directory(directory: Path, nbytes: int) -> Iterator[Path]:
    """Yields a folder to write about so many bytes into, which becomes `directory` at the end.

    Raises SetupError: the directory is in use, another process is writing it, the disk is too small or cannot be
    written to.
    """
    directory = directory.absolute()
    try:
        if directory.exists() and any(directory.iterdir()):
            raise SetupError(f"{directory} is not empty")
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = directory.with_name(f".{directory.name}.partial")
        with _own(partial):
            need, free = nbytes + SPARE_BYTES, shutil.disk_usage(partial).free
            if need > free:
                raise SetupError(
                    f"{directory.parent} has {free / 1e9:.1f} GB free, and the model needs {need / 1e9:.1f} GB"
                )
            yield partial
            partial.replace(directory)
            _sync(directory.parent)
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise SetupError(f"{directory} cannot be written: {error.strerror}{where}") from error


def write_weights(
    directory: Path,
    units: Mapping[str, Unit],
    content: Callable[[str], Iterable[tuple[str, memoryview]]],
    *,
    shard_bytes: int,
) -> None:
    """Write files of about `shard_bytes`, each holding whole units, and their index.

    `content` is asked for each unit once, in order: its tensors' bytes, piece by piece.
    """
    shards = _shards(units, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor: of_unit for key in keys for tensor, of_unit in units[key].items()}
        weight_map |= dict.fromkeys(tensors, name)
        with new_file(directory / name) as file:
            header, places = _header(tensors)
            file.write(header)
            for key in keys:
                for tensor, piece in content(key):
                    file.seek(places[tensor])
                    places[tensor] += file.write(piece)
    total = sum(tensor.nbytes for unit in units.values() for tensor in unit.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_json(file: Path, document: object) -> None:
    """As transformers writes it."""
    with new_file(file) as out:
        out.write((json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is on the disk when it is left."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _own(partial: Path) -> Iterator[None]:
    """An empty folder, ours as long as this lasts; nothing is left of it but what was renamed."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another process is writing {partial}") from None
        try:
            _clear(partial)
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        entry.unlink()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shards(units: Mapping[str, Unit], shard_bytes: int) -> Sequence[Sequence[str]]:
    """Units in order, at most `shard_bytes` together, but at least one a shard."""
    shards: list[list[str]] = []
    room = 0
    for key, unit in units.items():
        nbytes = sum(tensor.nbytes for tensor in unit.values())
        if nbytes > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= nbytes
    return shards


def _header(tensors: Mapping[str, NewTensor]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where each tensor begins in the file.

    Its length, then JSON with dtype, shape and place of each, padded to 8 bytes. The largest items come first, so that
    each tensor lies at a multiple of its own: readers map them.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype]):
        places[name], end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [places[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + place for name, place in places.items()}
