"""API keys, read from a file of their hashes. Sees a key only while it compares; knows nothing of doors.

    - {id: alice, sha256: "9f86d081…", requests_per_minute: 60, tokens_per_minute: 20000, max_concurrency: 4}
    - {id: bob, sha256: "60303ae2…"}

YAML or JSON. `manta keys new` makes a key and its entry.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from cluster.errors import ConfigError

PREFIX = "manta-"  # so that a scanner for leaked secrets can find our keys
RANDOM_BYTES = 32
MAX_AGE_S = 1.0  # how long a change of the file may go unnoticed

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]  # changes whenever the file does


class ApiKey(BaseModel):
    """One entry of the file. A limit that is None does not bind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9._-]{1,64}\z")]  # what logs and metrics show
    sha256: Annotated[str, StringConstraints(pattern=r"\A[0-9a-fA-F]{64}\z", to_lower=True)]
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)  # prompt and generated ones
    max_concurrency: int | None = Field(None, ge=1)  # requests at once


_Entries = TypeAdapter(tuple[ApiKey, ...])


def new_key() -> str:
    """A fresh key, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def digest(key: str) -> str:
    """What the file holds of a key. No salt and no stretching: a key has too many random bits to be guessed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Every entry. Raises ConfigError, which names file and entry and never shows what stands there."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", see line {mark.line + 1}"
        raise ConfigError(f"{path} is neither YAML nor JSON{where}") from None
    if not isinstance(document, list):
        raise ConfigError(f"{path}: expected a list of entries with id and sha256")
    try:
        keys = _Entries.validate_python(tuple(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: entry {where}: {first['msg']}") from None
    for name in ("id", "sha256"):
        values = [getattr(key, name) for key in keys]
        for i, value in enumerate(values):
            if value in values[:i]:
                raise ConfigError(f"{path}: entry {i}.{name}: the same as that of entry {values.index(value)}")
    return keys


class ApiKeyFile:
    """The keys of one file, as of at most MAX_AGE_S ago. A file that became wrong changes nothing until mended."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._stamp = self._look()
        self._keys = read_api_keys(path)
        self._looked_at = time.monotonic()

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key. Takes the same time whichever entry it is, or none."""
        self._refresh()
        given = digest(key)
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, given):
                found = entry
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < MAX_AGE_S:
            return
        self._looked_at = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_api_keys(self._path)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        logger.info("read %d API keys from %s", len(self._keys), self._path)

    def _look(self) -> _Stamp | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino, stat.st_size)
