"""The API key of a server without a file of keys: MANTA_API_KEY, or one that it makes. Knows nothing of doors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from gateway.admission.access import is_loopback
from gateway.admission.api_keys import digest, new_key

KEY = "MANTA_API_KEY"
MAKE = "MANTA_MAKE_API_KEY"  # the image says so: a container's doors are open to other machines
SHORTEST = 16


@contextmanager
def with_key(gateway: GatewayConfig) -> Iterator[tuple[GatewayConfig, str | None]]:
    """The same with a file of one key's hash, if it is to have one, and the key, if it was made here.

    The file lies in a folder of this user's and goes when the server ends. Raises ConfigError for a key too short.
    """
    given = os.environ.pop(KEY, "").strip()  # Ray's processes, which inherit the rest, do not need it
    made = not given and os.environ.get(MAKE, "0") not in ("", "0") and not is_loopback(gateway.host)
    if gateway.api_keys_file is not None or not (given or made):
        yield gateway, None
        return
    if given and len(given) < SHORTEST:
        raise ConfigError(f"{KEY}: a key has {SHORTEST} characters or more, so that nobody guesses it")
    key = given or new_key()
    with tempfile.TemporaryDirectory(prefix="manta-keys-") as directory:
        file = Path(directory) / "api-keys.json"
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            json.dump([{"id": "given" if given else "made-at-start", "sha256": digest(key)}], stream)
        yield gateway.model_copy(update={"api_keys_file": file}), key if made else None
