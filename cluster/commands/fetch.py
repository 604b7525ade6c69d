"""`manta fetch`: brings models from the hub into the local cache and verifies every byte, or waits for who does.

Files of weights lie in the hub's cache under their SHA-256, which is computed again here. A note beside the cache then
says which version was found whole; those who wait read it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import EMBEDDED, is_directory, resolve_model
from cluster.errors import CheckpointError, SetupError

WAIT_INTERVAL_S = 5.0

_SHA256 = re.compile(r"[0-9a-f]{64}")

console = Console(soft_wrap=True, highlight=False)


def run(models: list[str], revision: str | None, *, wait: bool, timeout_s: float) -> None:
    """Raises ConfigError, CheckpointError, or SetupError when it waited for too long.

    A model that says `org/name@revision` itself is not asked of `revision`.
    """
    deadline = time.monotonic() + timeout_s
    for name in models:
        model, own = (name, None) if _is_here(name) else _split(name)
        if not wait:
            _fetch(model, own or revision)
        elif _is_here(model):
            open_checkpoint(resolve_model(model, own or revision))
        else:
            console.print(f"Waiting for {name} …")
            while not note_of(model, own or revision).is_file():
                if time.monotonic() > deadline:
                    raise SetupError(f"{name} was not fetched within {timeout_s:g} s")
                time.sleep(WAIT_INTERVAL_S)


def note_of(model: str, revision: str | None) -> Path:
    """Where it is written that this version of a model was found whole."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = model if revision is None else f"{model}@{revision}"
    return Path(HF_HUB_CACHE) / ".manta" / f"{name.replace('/', '--')}.json"


def verify(directory: Path) -> int:
    """Bytes that were read. Raises CheckpointError for a file that is not what its name in the cache says."""
    total = 0
    for name, blob in _blobs(directory):
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        total += blob.stat().st_size
        if found != blob.name:
            raise CheckpointError(f"{name} is damaged: its SHA-256 is {found}, and the hub's is {blob.name}")
    return total


def _split(name: str) -> tuple[str, str | None]:
    model, _, revision = name.partition("@")
    return model, revision or None


def _is_here(model: str) -> bool:
    """So that nobody fetches it, and nobody waits for who does."""
    return model in EMBEDDED or is_directory(model)


def _fetch(model: str, revision: str | None) -> None:
    started = time.monotonic()
    directory = resolve_model(model, revision)
    checkpoint = open_checkpoint(directory)
    note = {"directory": str(directory), "fingerprint": checkpoint.fingerprint}
    file = note_of(model, revision)
    if _read(file) == note:
        console.print(f"{model} was fetched and verified before: {directory}")
        return
    total = verify(directory)
    console.print(f"{model}: {directory}")
    console.print(
        f"  fingerprint {checkpoint.fingerprint[:8]}, {total / 1e9:.2f} GB in {time.monotonic() - started:.0f} s"
    )
    if not _is_here(model):
        draft = file.with_name(f"{secrets.token_hex(6)}.new")  # another process may write the same note
        try:
            file.parent.mkdir(exist_ok=True)
            draft.write_text(json.dumps(note))
            draft.replace(file)
        except OSError as error:
            raise SetupError(f"{file} cannot be written: {error.strerror}") from error


def _read(note: Path) -> object:
    """None where there is none, or a machine that lost its power left it empty."""
    with suppress(OSError, ValueError):
        return json.loads(note.read_text())
    return None


def _blobs(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Files of a snapshot, and what they link to where that is named by its content."""
    for file in sorted(directory.iterdir()):
        if file.is_symlink() and _SHA256.fullmatch(file.resolve().name):
            yield file, file.resolve()
