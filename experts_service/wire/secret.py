"""The lane secret: a file that only its owner reads, made at first start where nobody mounted one. Knows no socket."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cluster.errors import ConfigError
from cluster.guarded_file import read_guarded

DEFAULT_FILE = Path("~/.manta/lane_secret")
MIN_BYTES, MAX_BYTES = 32, 4096


def ensure_lane_secret(file: Path | None = None) -> Path:
    """The path of a readable secret; made when it is the default and missing. Raises ConfigError."""
    path = (file or DEFAULT_FILE).expanduser().absolute()
    if file is None and not path.exists():
        try:
            _create(path)
        except OSError as error:
            raise ConfigError(f"lane_secret_file: cannot make {path}: {error.strerror}") from error
    read_lane_secret(path)
    return path


def read_lane_secret(path: Path) -> bytes:
    """The secret's bytes, without surrounding white space. Raises ConfigError; no message shows what is in the file."""
    try:
        secret = read_guarded(path, secret=True).strip()
    except ConfigError as error:
        raise ConfigError(f"lane_secret_file: {error}") from None
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise ConfigError(f"lane_secret_file: {path} holds {len(secret)} bytes; {MIN_BYTES} to {MAX_BYTES} are wanted")
    return secret


def _create(path: Path) -> None:
    """Write a fresh secret; of several processes that do so at once, one wins and no other sees half a file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32) + "\n")
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
