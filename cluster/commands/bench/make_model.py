"""`manta bench make-model`: writes a random model tensor by tensor, so that memory holds one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.writing.new_model import NewTensor, new_directory, write_json, write_weights
from cluster.commands.bench.shapes import SHAPES, hub_config, hub_name, num_parameters, standard_deviation
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import SetupError

SHARD_BYTES = 10**9


def run(shape: str, directory: Path, seed: int, num_layers: int | None = None) -> None:
    """The first `num_layers` of a shape, or all. Raises SetupError: the directory is in use, or the disk too small."""
    architecture = SHAPES[shape]
    architecture = replace(architecture, layers=architecture.layers[:num_layers])
    total = 2 * num_parameters(architecture)
    out, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    out.print(
        f"{shape}, {architecture.num_layers} layers: {total / 2e9:.2f} B parameters in bf16, {total / 1e9:.2f} GB, "
        f"seed {seed}"
    )
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
    with new_directory(directory, 2 * num_parameters(architecture)) as partial:
        _write_weights(architecture, partial, seed, shard_bytes, on_bytes)
        write_json(partial / "config.json", hub_config(architecture))
        ids = {"bos_token_id": architecture.bos_token_id, "eos_token_id": architecture.eos_token_ids[0]}
        write_json(partial / "generation_config.json", ids)
        _write_tokenizer(architecture, partial)


def _write_weights(
    architecture: Architecture, directory: Path, seed: int, shard_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    tensors = {hub_name(architecture, name): shape for name, shape in all_tensors(architecture).items()}
    seeds = {name: seed + number for number, name in enumerate(tensors)}

    def content(name: str) -> Iterator[tuple[str, memoryview]]:
        stored = _random(name, tensors[name], seeds[name])
        yield name, stored.flatten().view(torch.uint8).numpy().data
        on_bytes(stored.nbytes)

    units = {name: {name: NewTensor("BF16", shape)} for name, shape in tensors.items()}
    write_weights(directory, units, content, shard_bytes=shard_bytes)


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
    write_json(directory / "tokenizer.json", document)
