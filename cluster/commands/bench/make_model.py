"""`manta bench make-model`: writes a random model tensor by tensor, so that memory holds one tensor at a time.

The directory appears whole or not at all: everything is written beside it and renamed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.commands.bench.shapes import SHAPES, hub_config, num_parameters, standard_deviation
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import SetupError

SHARD_BYTES = 10**9
SPARE_BYTES = 64 * 2**20  # for tokenizer, headers and the file system itself


def run(shape: str, directory: Path, seed: int) -> None:
    """Raises SetupError when the directory is in use or the disk too small."""
    architecture = SHAPES[shape]
    total = 2 * num_parameters(architecture)
    out, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    out.print(f"{shape}: {total / 2e9:.2f} B parameters in bf16, {total / 1e9:.2f} GB, seed {seed}")
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress, transient=True) as bars:
        bar = bars.add_task("", total=total)
        write_model(architecture, directory, seed=seed, on_bytes=lambda n: bars.advance(bar, n))
    out.print(f"written to {directory}")


def write_model(
    architecture: Architecture,
    directory: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Weights, configs, tokenizer and chat template of a random model."""
    directory = directory.absolute()
    if directory.exists() and any(directory.iterdir()):
        raise SetupError(f"{directory} is not empty")
    directory.parent.mkdir(parents=True, exist_ok=True)
    need, free = 2 * num_parameters(architecture) + SPARE_BYTES, shutil.disk_usage(directory.parent).free
    if need > free:
        raise SetupError(f"{directory.parent} has {free / 1e9:.1f} GB free, and the model needs {need / 1e9:.1f} GB")
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        partial.chmod(0o755)
        _write_weights(architecture, partial, seed, shard_bytes, on_bytes)
        _write_json(partial / "config.json", hub_config(architecture))
        ids = {"bos_token_id": architecture.bos_token_id, "eos_token_id": architecture.eos_token_ids[0]}
        _write_json(partial / "generation_config.json", ids)
        _write_tokenizer(architecture, partial)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(
    architecture: Architecture, directory: Path, seed: int, shard_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    tensors = all_tensors(architecture)
    seeds = {name: seed + number for number, name in enumerate(tensors)}
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (directory / file).open("wb") as out:
            out.write(_header({name: tensors[name] for name in names}))
            for name in names:
                stored = _random(name, tensors[name], seeds[name])
                out.write(stored.flatten().view(torch.uint8).numpy().data)
                on_bytes(stored.nbytes)
    total = 2 * num_parameters(architecture)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: Mapping[str, Shape], shard_bytes: int) -> list[list[str]]:
    """Names in order, at most `shard_bytes` together, but at least one a shard."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= nbytes
    return shards


def _header(tensors: Mapping[str, Shape]) -> bytes:
    """A safetensors header: its length, then JSON with dtype, shape and place of each tensor, padded to 8 bytes."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _random(name: str, shape: Shape, seed: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    deviation = standard_deviation(name, shape)
    if deviation is None:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, deviation, generator=torch.Generator().manual_seed(seed))


def _write_tokenizer(architecture: Architecture, directory: Path) -> None:
    """The demo model's tokenizer; the ids beyond its own are words that no text encodes to, but that decode to text."""
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / file, directory / file)
    document = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = document["model"]["vocab"]
    known = max(max(vocab.values()), *(token["id"] for token in document["added_tokens"])) + 1
    if known > architecture.vocab_size:
        raise SetupError(f"the tokenizer has {known} tokens, more than a vocabulary of {architecture.vocab_size}")
    words = (word for number in count() if (word := f"Ġw{number}") not in vocab)
    vocab |= {next(words): token_id for token_id in range(known, architecture.vocab_size)}
    _write_json(directory / "tokenizer.json", document)


def _write_json(file: Path, document: object) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
