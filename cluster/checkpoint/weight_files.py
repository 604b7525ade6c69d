"""Finds the safetensors files of a model directory and reads their headers. Knows file names; knows no tensor names."""

from __future__ import annotations

from pathlib import Path

from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.layouts import Layout
from cluster.checkpoint.safetensors_header import StoredTensor, read_header
from cluster.errors import CheckpointError

STEMS: dict[Layout, str] = {"huggingface": "model", "mistral": "consolidated"}
GGUF = (  # what is wrong with it
    "which is llama.cpp's format and not read here: serve it by llama.cpp, or take a safetensors version of the model, "
    "quantised or not."
)
UNSAFE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


def find_layout(directory: Path) -> Layout:
    """Hugging Face's where both are there. Raises CheckpointError that says what is missing."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory.")
    config, params = (directory / "config.json").is_file(), (directory / "params.json").is_file()
    if config and _weight_files(directory, "huggingface"):
        return "huggingface"
    if params and _weight_files(directory, "mistral"):
        return "mistral"
    if gguf := sorted(directory.glob("*.gguf")):
        raise CheckpointError(f"{directory} has its weights only as {gguf[0].name}, {GGUF}")
    if not config and not params:
        raise CheckpointError(
            f"{directory} has neither config.json nor params.json, so it is no model that Manta knows."
        )
    unsafe = sorted(file.name for file in directory.iterdir() if file.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise CheckpointError(
            f"{directory} has its weights only as {unsafe[0]}: such files can run code when they are loaded, so Manta "
            "reads safetensors only. Convert them, or take a safetensors version of the model."
        )
    if _weight_files(directory, "mistral"):
        raise CheckpointError(f"{directory} has consolidated safetensors files and no params.json to describe them.")
    wanted = "model*.safetensors" if config else "consolidated*.safetensors"
    other = sorted(file.name for file in directory.glob("*.safetensors"))
    hint = f"; {other[0]} is not of that name, and may be renamed to it" if other else ""
    raise CheckpointError(f"{directory} has no weights; expected {wanted}{hint}.")


def read_headers(directory: Path, layout: Layout) -> dict[str, StoredTensor]:
    """Every tensor of every weight file by name. Raises CheckpointError for a missing file or a name that is twice."""
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(directory, layout):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"Tensor {name!r} is twice, in {tensors[name].file} and in {file}.")
            tensors[name] = tensor
    for name, file in _index(directory, layout).items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{_index_file(directory, layout)} places tensor {name!r} in {file.name}, which does not have it."
            )
    return tensors


def _weight_files(directory: Path, layout: Layout) -> list[Path]:
    """The single file, or those that the index names, or all that look like shards."""
    stem = STEMS[layout]
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    if index := _index(directory, layout):
        return sorted(set(index.values()))
    return sorted(directory.glob(f"{stem}[-.]*.safetensors"))


def _index(directory: Path, layout: Layout) -> dict[str, Path]:
    """Tensor name → file. Empty where there is no index, or a single file that needs none."""
    file = _index_file(directory, layout)
    if not file.is_file() or (directory / f"{STEMS[layout]}.safetensors").is_file():
        return {}
    weight_map = JsonDocument.read(file).section("weight_map")
    if not weight_map.values:
        raise CheckpointError(f"{file} has no weight_map, which says where each tensor is.")
    for name, shard in weight_map.values.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise weight_map.error(
                repr(name), f"is {shard!r}; expected the name of a safetensors file beside the index"
            )
    for shard, name in {shard: name for name, shard in weight_map.values.items()}.items():
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing; {file} places tensor {name!r} in it.")
    return {name: directory / shard for name, shard in weight_map.values.items()}


def _index_file(directory: Path, layout: Layout) -> Path:
    return directory / f"{STEMS[layout]}.safetensors.index.json"
