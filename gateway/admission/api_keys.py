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
import threading
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cluster.errors import ConfigError
from cluster.guarded_file import read_guarded
from cluster.yaml_document import YamlDocument, parse_yaml

PREFIX = "manta-"  # so that a scanner for leaked secrets can find our keys
RANDOM_BYTES = 32
MOST = 10**12  # of a limit
EXPECTED = {
    "id": "1 to 64 letters, digits, dots, dashes or underscores",
    "sha256": "64 hexadecimal digits, as `manta keys new` writes them",
}
MAX_AGE_S = 1.0  # how long a change of the file may go unnoticed

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int, int]  # changes whenever the file does


class ApiKey(BaseModel):
    """One entry of the file. A limit that is None does not bind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9._-]{1,64}\z")]  # what logs and metrics show
    sha256: Annotated[str, StringConstraints(pattern=r"\A[0-9a-fA-F]{64}\z", to_lower=True)]
    requests_per_minute: int | None = Field(None, ge=1, le=MOST)
    tokens_per_minute: int | None = Field(None, ge=1, le=MOST)  # prompt and generated ones
    max_concurrency: int | None = Field(None, ge=1, le=MOST)  # choices at once: a request of n = 4 is four


def new_key() -> str:
    """A fresh key, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def digest(key: str) -> str:
    """What the file holds of a key. No salt and no stretching: a key has too many random bits to be guessed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Every entry. Raises ConfigError, which names file, line and field and never shows what stands there."""
    document = parse_yaml(read_guarded(path), str(path), secret=True)
    if not isinstance(document.value, list):
        raise ConfigError(f"{path}: expected a list of entries with id and sha256")
    keys = tuple(_entry(path, document, i) for i in range(len(document.value)))
    for name in ("id", "sha256"):
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            other = first.setdefault(getattr(key, name), i)
            if other != i:
                raise ConfigError(
                    f"{path}, line {document.line(i, name)}: {name}: the same as in line {document.line(other, name)}"
                )
    return keys


def _entry(path: Path, document: YamlDocument, index: int) -> ApiKey:
    try:
        return ApiKey.model_validate(document.value[index])
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_input=False, include_context=False)
        where = f"{path}, line {document.line(index, *first['loc'])}"
        [field] = first["loc"] or ("entry",)
        if field in EXPECTED and first["type"] in ("string_pattern_mismatch", "string_type"):
            raise ConfigError(f"{where}: {field}: expected {EXPECTED[field]}") from None
        if first["type"] == "extra_forbidden":  # its name may be a key that somebody put there
            raise ConfigError(f"{where}: an unknown field; known are {', '.join(ApiKey.model_fields)}") from None
        raise ConfigError(f"{where}: {field}: {first['msg']}") from None


class ApiKeyFile:
    """The keys of one file, looked at every MAX_AGE_S. One that became wrong changes nothing until it is mended."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._stamp = self._look()
        self._keys = read_api_keys(path)
        self._looked_at = time.monotonic()
        self._reader: threading.Thread | None = None  # a long file would keep the event loop

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
        if stamp == self._stamp or (self._reader is not None and self._reader.is_alive()):
            return
        self._stamp = stamp
        self._reader = threading.Thread(target=self._read, name="api-keys", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            self._keys = read_api_keys(self._path)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        except Exception as error:  # a fault of ours; its text may show what is in the file
            logger.error("the API keys stay as they were: %s at %s", type(error).__name__, self._path)
        else:
            logger.info("read %d API keys from %s", len(self._keys), self._path)

    def _look(self) -> _Stamp | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_mode)
