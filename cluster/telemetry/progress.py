"""How far each process is with reading its weights, for others to show. Knows bytes and Ray's key-value store only.

One entry per (application, deployment): a restarted loader overwrites what its predecessor left. Without Ray,
publishing does nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from ray.experimental import internal_kv

PUBLISH_INTERVAL_S = 0.2

_NAMESPACE = b"manta_loading"


@dataclass(frozen=True, slots=True)
class Progress:
    """One deployment's loading."""

    deployment: str
    loaded_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        unit, size = ("GB", 1e9) if self.total_bytes >= 1e8 else ("MB", 1e6)
        return f"{self.deployment}: {self.loaded_bytes / size:.1f} of {self.total_bytes / size:.1f} {unit}"


class LoadingProgress:
    """Counts bytes and publishes the sum, at most five times a second. Call it with the bytes of each read."""

    def __init__(self, application: str, deployment: str, total_bytes: int) -> None:
        self.loaded_bytes = 0
        self.total_bytes = total_bytes
        self._key = _key(application, deployment)
        self._published_at = 0.0
        self._publish()

    def __call__(self, nbytes: int) -> None:
        self.loaded_bytes += nbytes
        now = time.monotonic()
        if self.loaded_bytes >= self.total_bytes or now - self._published_at >= PUBLISH_INTERVAL_S:
            self._published_at = now
            self._publish()

    def _publish(self) -> None:
        if internal_kv._internal_kv_initialized():
            value = json.dumps([self.loaded_bytes, self.total_bytes])
            internal_kv._internal_kv_put(self._key, value, namespace=_NAMESPACE)


def read_progress(application: str) -> list[Progress]:
    """Every deployment of the application that has begun to load, by name. Empty without Ray."""
    if not internal_kv._internal_kv_initialized():
        return []
    found = []
    for key in sorted(internal_kv._internal_kv_list(_key(application, ""), namespace=_NAMESPACE)):
        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if value is not None:  # else it was cleared since it was listed
            found.append(Progress(json.loads(key)[1], *json.loads(value)))
    return found


def clear_progress(application: str) -> None:
    """Forget an application, once it is loaded or deleted."""
    if internal_kv._internal_kv_initialized():
        internal_kv._internal_kv_del(_key(application, ""), del_by_prefix=True, namespace=_NAMESPACE)


def _key(application: str, deployment: str) -> bytes:
    """A JSON pair, so that no application's keys begin with another's; without a deployment, what they begin with."""
    key = json.dumps([application, deployment]).encode()
    return key if deployment else key.removesuffix(b'"]')
