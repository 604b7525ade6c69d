"""Bounds the bytes of requests that no answer has been begun for. Knows tenants and sizes; knows no door."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Overloaded
from cluster.fairness import is_refused

MOST_TIMES = 4  # `max_bytes` at the very most, however many tenants come for their share


class HeldBytes:
    """`max_bytes` of all. When they are taken, a tenant still gets its even share, while there is room at all."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()  # by tenant

    @contextmanager
    def of(self, tenant: str) -> Iterator[Held]:
        """What one request holds, until this ends or it is released."""
        held = Held(self, tenant)
        try:
            yield held
        finally:
            held.release()

    def add(self, tenant: str, size: int) -> None:
        """Raises Overloaded."""
        is_full = sum(self._held.values()) + size > MOST_TIMES * self._max_bytes
        if is_full or is_refused(self._held, tenant, self._max_bytes - size):
            raise Overloaded(
                "too many large requests are being received (gateway.max_bytes_received); try again later",
                reason="shed_bodies",
            )
        self._held[tenant] += size

    def remove(self, tenant: str, size: int) -> None:
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]


class Held:
    """The bytes of one request."""

    def __init__(self, of_all: HeldBytes, tenant: str) -> None:
        self._of_all = of_all
        self._tenant = tenant
        self._size = 0

    def add(self, size: int) -> None:
        """So many more have come. Raises Overloaded."""
        self._of_all.add(self._tenant, size)
        self._size += size

    def release(self) -> None:
        """An answer has begun, or there is none."""
        self._of_all.remove(self._tenant, self._size)
        self._size = 0
