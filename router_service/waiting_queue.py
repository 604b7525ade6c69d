"""The sequences that wait for a place in the running batch. Knows who came when, and whose they are; no tokens.

Tenants, the requests of one API key each (one salt of the prefix cache), take turns; within one, the first to come is
the first to go. A sequence that was preempted goes before all of them: it has begun.
"""

from __future__ import annotations

from collections import Counter, deque

from router_service.sequence import Sequence


class WaitingQueue:
    """Round robin over tenants, first in first out within each."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._tenants: dict[str, deque[Sequence]] = {}  # whose turn is next comes first; none is empty

    def __len__(self) -> int:
        return sum(self.counts().values())

    def counts(self) -> Counter[str]:
        """How many wait, by tenant. May be called from any thread."""
        counts = Counter({tenant: len(queue) for tenant, queue in list(self._tenants.items())})
        counts.update(_tenant(sequence) for sequence in list(self._preempted))
        return counts

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._preempted or sequence in self._tenants.get(_tenant(sequence), ())

    def push(self, sequence: Sequence) -> None:
        """Behind those of its tenant."""
        self._tenants.setdefault(_tenant(sequence), deque()).append(sequence)

    def push_preempted(self, sequence: Sequence) -> None:
        """Before all others."""
        self._preempted.appendleft(sequence)

    def peek(self) -> Sequence:
        """The next. The queue must not be empty."""
        return self._preempted[0] if self._preempted else next(iter(self._tenants.values()))[0]

    def pop(self) -> Sequence:
        """Take the next, which passes the turn to another tenant."""
        if self._preempted:
            return self._preempted.popleft()
        tenant = next(iter(self._tenants))
        queue = self._tenants.pop(tenant)
        sequence = queue.popleft()
        if queue:
            self._tenants[tenant] = queue  # behind the others
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Wherever it is in the queue. Raises ValueError when it is not."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        tenant = _tenant(sequence)
        queue = self._tenants.get(tenant)
        if queue is None:
            raise ValueError(f"{sequence.request.key} does not wait")
        queue.remove(sequence)
        if not queue:
            del self._tenants[tenant]


def _tenant(sequence: Sequence) -> str:
    return sequence.request.cache_salt
