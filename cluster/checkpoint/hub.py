"""Turns what a user calls a model into a directory: one that exists, an embedded one, the hub's cache, or a download.

Downloads safetensors, JSON, chat templates and tokenizers, and nothing that can run code.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from cluster.checkpoint.checkpoint import check_config, open_checkpoint
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.weight_files import GGUF
from cluster.demo_model import DENSE_DIRECTORY, DIRECTORY
from cluster.errors import CheckpointError, ConfigError, MantaError

EMBEDDED = {"demo": DIRECTORY, "demo-dense": DENSE_DIRECTORY}  # the same names wherever the code is installed
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model*")
_WEIGHTS = ("model*.safetensors", "consolidated*.safetensors")  # the first kind that the model has is taken
_SUBFOLDERS = "*/*"


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The model's directory. Raises ConfigError when there is none, CheckpointError when Manta cannot serve it.

    `revision` is a commit, a branch or a tag of a model of the hub; None: main. What the cache knows a branch by stays.
    """
    found = Path(model).expanduser().resolve() if is_directory(model) else EMBEDDED.get(model)
    if found is not None:
        if revision is not None:
            raise ConfigError(f"revision: {model!r} is a directory here; only a model of the hub has revisions")
        return found
    mode = _mode(model)
    if model.endswith(".gguf") and stat.S_ISREG(mode):
        raise ConfigError(f"The model {model!r} is a GGUF file, {GGUF}")
    if not _HUB_ID.fullmatch(model) or mode:
        raise ConfigError(
            f"The model {model!r} is neither a directory nor a hub id such as 'mistralai/Mixtral-8x7B-v0.1'."
        )
    damage = ""
    if cached := _cached(model, revision):
        try:
            open_checkpoint(cached)
            return cached
        except CheckpointError as error:  # perhaps a download that was interrupted
            damage = f" What is in the local cache cannot be served: {error.message}"
    try:
        return _download(model, revision)
    except MantaError:
        raise
    # The client raises whatever its HTTP library does, and that library changes between its versions.
    except Exception as error:
        raise ConfigError(f"{_explain(model, revision, error)}{damage}") from error


def is_directory(model: str) -> bool:
    """Whether it names one of this machine."""
    return stat.S_ISDIR(_mode(model))


def _mode(model: str) -> int:
    """Of the file or directory of that name; 0 where there is none, or none can be: `~nobody`, or a name too long."""
    with suppress(OSError, RuntimeError, ValueError):
        return Path(model).expanduser().stat().st_mode if model else 0
    return 0


def _cached(model: str, revision: str | None) -> Path | None:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except (OSError, ValueError):
        return None


def _download(model: str, revision: str | None) -> Path:
    """Small files first: a model that is not supported is refused before its weights are fetched."""
    listing: list[Any] = huggingface_hub.snapshot_download(
        model, revision=revision, dry_run=True, ignore_patterns=_SUBFOLDERS
    )
    weights = _weight_pattern(model, [file.filename for file in listing])
    directory = _fetch(model, revision, _SMALL_FILES)
    if (directory / "config.json").is_file():
        check_config(JsonDocument.read(directory / "config.json"))
    return _fetch(model, revision, (*_SMALL_FILES, weights))


def _fetch(model: str, revision: str | None, patterns: Iterable[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=_SUBFOLDERS
        )
    )


def _weight_pattern(model: str, names: list[str]) -> str:
    for pattern in _WEIGHTS:
        if any(Path(name).match(pattern) for name in names):
            return pattern
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(f"The hub's {model} has its weights only as {gguf[0]}, {GGUF}")
    raise CheckpointError(
        f"The hub's {model} has no {' or '.join(_WEIGHTS)}. Manta reads safetensors only: .bin, .pth and .pt files can "
        "run code when they are loaded."
    )


def _explain(model: str, revision: str | None, error: Exception) -> str:
    causes = (error, error.__cause__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"The model {model!r} is gated: accept its terms on its page at the hub, then run `hf auth login`."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"There is no directory {model!r}, and the hub knows no such model, or it is private and needs a token."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"revision: the hub's {model} has no {revision or 'main'!r}."
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    return f"There is no directory {model!r}, and it cannot be fetched from the hub: {reason.rstrip('.')}."
