"""The sequences that wait for a place in the running batch. Knows who came when, whose they are, and which are long.

Every tenant, the requests of one API key (one salt of the prefix cache), has two lines: short prompts do not stand
behind its long ones. In a line the lowest `priority` goes first, and of one priority the first to come; one that was
preempted goes before those that have not begun. Whose turn it is, the Scheduler says.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from router_service.scheduling.sequence import Sequence

_PRIORITY = attrgetter("priority")
Line = tuple[str, bool]  # (tenant, whether it is the line of its long prompts)


class WaitingQueue:
    """First in, first out, among those of one priority in each line."""

    def __init__(self, longest_short: int) -> None:
        """A sequence of more than `longest_short` tokens is long."""
        self.longest_short = longest_short
        self._lines: dict[Line, list[Sequence]] = {}  # none is empty

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def counts(self) -> Counter[str]:
        """How many wait, by tenant. May be called from any thread."""
        counts: Counter[str] = Counter()
        for (tenant, _), line in list(self._lines.items()):
            counts[tenant] += len(line)
        return counts

    def tenants(self) -> list[str]:
        """Those of whom at least one waits, each once."""
        return list(dict.fromkeys(tenant for tenant, _ in self._lines))

    def line_of(self, sequence: Sequence) -> Line:
        """Where a sequence waits, or has waited until all its tokens are computed."""
        return (sequence.tenant, len(sequence) > self.longest_short)

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._lines.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._lines.get(self.line_of(sequence), ())

    def push(self, sequence: Sequence) -> None:
        """Behind those of its line that are as urgent."""
        line = self._lines.setdefault(self.line_of(sequence), [])
        line.insert(bisect_right(line, sequence.priority, key=_PRIORITY), sequence)

    def push_preempted(self, sequence: Sequence) -> None:
        """Before those of its line that are as urgent."""
        line = self._lines.setdefault(self.line_of(sequence), [])
        line.insert(bisect_left(line, sequence.priority, key=_PRIORITY), sequence)

    def head(self, line: Line) -> Sequence | None:
        """The next of a line, if any."""
        return self._lines[line][0] if line in self._lines else None

    def displaced_by(self, priority: int, tenant: str) -> Sequence | None:
        """Whose place a more urgent one may take: of the tenant's least urgent the last to come. Nothing of it has been
        computed, nor of siblings, which would fail with it. May be called from any thread.
        """
        lines = (list(line) for (name, _), line in list(self._lines.items()) if name == tenant)
        lower = [one for one in chain.from_iterable(lines) if one.priority > priority and one.may_be_displaced]
        return max(lower, key=lambda one: (one.priority, one.arrived_at), default=None)

    def less_urgent(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those of its tenant that a sequence goes before, whatever their length."""
        for is_long in (False, True):
            line = self._lines.get((sequence.tenant, is_long), [])
            yield from line[bisect_right(line, sequence.priority, key=_PRIORITY) :]

    def heads(self) -> list[Sequence]:
        """The next of each line."""
        return [line[0] for line in self._lines.values()]

    def remove(self, sequence: Sequence) -> None:
        """Wherever it is in the queue. Raises ValueError when it is not."""
        name = self.line_of(sequence)
        line = self._lines.get(name)
        if line is None:
            raise ValueError(f"{sequence.request.key} does not wait")
        line.remove(sequence)
        if not line:
            del self._lines[name]
