"""Which replica of a group to ask, how many rows it gets, and when to ask another one. Plain numbers; knows no sockets.

Replicas are asked in turn, those that still owe answers later, and one that takes clearly longer than the fastest last:
a straggler, or one on slower hardware. Now and then it is asked again, to see whether that is still so. Many rows are
shared out by the rows a second that were measured of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from experts_service.routing_table import Replica

WINDOW, FEWEST = 128, 16  # dispatches that say what is usual; fewer say nothing
RECENT = 3  # dispatches whose median is a replica's slowness: a single late one says nothing, its very first least
CLEARLY = 2.0  # times the slowness of the fastest, below which all are alike
NOISE_S = 0.002  # a difference of less is the machine's, whatever is usual
SPLIT_ROWS = 64  # fewest rows of a group that are worth a replica of their own: each reads the weights again
UNLIKE = 1.25  # times the rows a second of the slowest, from which many rows are shared out by speed
PROBE_EVERY = 64  # choices, of which one goes to the replica that was asked longest ago
HEDGE_AFTER, SHORTEST_S = 3.0, 0.005  # times the 95th percentile, and never sooner
BUDGET, BURST = 0.05, 10.0  # hedges a dispatch in the long run, and at once
OVERDUE_AFTER, OVERDUE_S = 30.0, 1.0  # times the 95th percentile, and never sooner: then the budget does not matter


class _Usual:
    """How long dispatches of one size take in one group."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._fresh = 0
        self.median_s = self.p95_s = 0.0  # 0: not known yet

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._fresh += 1
        if self._fresh >= FEWEST:
            self._fresh = 0
            ranked = sorted(self._seconds)
            self.median_s, self.p95_s = ranked[len(ranked) // 2], ranked[int(0.95 * (len(ranked) - 1))]


class ReplicaLoads:
    """What one coordinator knows of the replicas that it asks. Used by one thread."""

    def __init__(self) -> None:
        self._usual: dict[tuple[int, int], _Usual] = {}  # by group, and size to a power of two
        self._slowness: dict[str, deque[float]] = {}  # the latest by replica id; 1: as usual
        self._usual_slowness: dict[str, float] = {}  # their medians
        self._row_s: dict[str, deque[float]] = {}  # seconds for each of many rows, the latest by replica id
        self._asked: dict[str, int] = {}  # the turn at which it was last asked
        self._turns: dict[int, tuple[Sequence[Replica] | None, deque[Replica]]] = {}  # by group
        self._fastest: dict[int, float] = {}  # by group, at most the least slowness of those who are asked in turn
        self._turn = 0
        self._shared = 0  # how often many rows were shared out by speed
        self._budget = BURST

    def choose(self, replicas: Sequence[Replica], owed: Callable[[str], int]) -> Replica:
        """The best of `replicas`; `owed(replica_id)` are the dispatches that it has not answered."""
        self._turn += 1
        in_turn = self._in_turn(replicas)
        chosen = in_turn[0]
        if owed(chosen.replica_id) or (self._turn % PROBE_EVERY and self._is_slow(chosen, replicas)):
            chosen = self.soonest(in_turn, owed)
        self._asked[chosen.replica_id] = self._turn
        in_turn.remove(chosen)
        in_turn.append(chosen)
        return chosen

    def _in_turn(self, replicas: Sequence[Replica]) -> deque[Replica]:
        """As they were asked, the one that was asked longest ago first. The same object for the same `replicas`."""
        of, in_turn = self._turns.get(replicas[0].group, (None, deque()))
        if of is not replicas:
            in_turn = deque(sorted(replicas, key=lambda replica: self._asked.get(replica.replica_id, 0)))
            self._turns[replicas[0].group] = replicas, in_turn
            self._fastest[replicas[0].group] = 0.0
        return in_turn

    def _is_slow(self, replica: Replica, replicas: Sequence[Replica]) -> bool:
        """Whether it takes clearly longer than the fastest. There may be hundreds: they are rarely looked through."""
        known = self._usual_slowness
        own, fastest = known.get(replica.replica_id, 1.0), self._fastest[replica.group]
        if own > CLEARLY * fastest:
            fastest = self._fastest[replica.group] = min([known.get(each.replica_id, 1.0) for each in replicas])
        return own > CLEARLY * fastest

    def soonest(self, replicas: Sequence[Replica], owed: Callable[[str], int]) -> Replica:
        """The first of those that will have answered soonest, by what they owe and by how slow they are."""
        known = self._usual_slowness
        slowness = [known.get(replica.replica_id, 1.0) for replica in replicas]
        fastest = min(slowness)
        best, soonest = replicas[0], float("inf")
        for replica, own in zip(replicas, slowness, strict=True):
            times = own / fastest
            after = (1 + owed(replica.replica_id)) * (times if times > CLEARLY else 1.0)
            if after == 1.0:
                return replica  # none is better, and of hundreds of replicas most owe nothing
            if after < soonest:
                best, soonest = replica, after
        return best

    def shares(self, replicas: Sequence[Replica], rows: int) -> list[tuple[str | None, int]]:
        """How many of so many rows each replica is to run; None: whoever `choose` says. No share is small.

        All shares are as large where nothing clearly differs. A replica too slow for a share of its own gets the
        smallest one now and then.
        """
        if rows < 2 * SPLIT_ROWS:
            return [(None, rows)]
        seconds = {one.replica_id: self._row_s[one.replica_id] for one in replicas if one.replica_id in self._row_s}
        speeds = {replica_id: 1.0 / _median(recent, 1.0) for replica_id, recent in seconds.items()}
        if not speeds or max(speeds.values()) < UNLIKE * min(speeds.values()):
            number = max(1, min(len(replicas), rows // SPLIT_ROWS))
            cuts = [rows * i // number for i in range(number + 1)]
            return [(None, end - start) for start, end in pairwise(cuts)]
        self._shared += 1
        probes = self._shared % PROBE_EVERY == 0
        unknown = sum(speeds.values()) / len(speeds)
        ranked = [(speeds.get(one.replica_id, unknown), one.replica_id) for one in replicas]
        ranked.sort(reverse=True)
        shares: list[tuple[str | None, int]] = []
        while ranked:
            total = sum(speed for speed, _ in ranked)
            speed, slowest = ranked.pop()
            share = round(rows * speed / total)
            if share < SPLIT_ROWS and ranked:
                if not probes:
                    continue
                probes, share = False, SPLIT_ROWS
            shares.append((slowest, share))
            rows -= share
        return shares

    def answered(self, replica: str, group: int, rows: int, seconds: float, *, beaten: bool = False) -> None:
        """A replica took so long; or longer, when it was `beaten` by the one that was asked after it."""
        usual = self._usual.get((group, rows.bit_length()))
        if usual is None:
            usual = self._usual[group, rows.bit_length()] = _Usual()
        if usual.median_s:
            recent = self._slowness.get(replica)
            if recent is None:
                recent = self._slowness[replica] = deque([1.0] * RECENT, maxlen=RECENT)
            recent.append((seconds + NOISE_S) / (usual.median_s + NOISE_S))
            slowness = self._usual_slowness[replica] = _median(recent, 1.0)
            self._fastest[group] = min(slowness, self._fastest.get(group, 0.0))
        if rows >= SPLIT_ROWS:
            self._row_s.setdefault(replica, deque(maxlen=RECENT)).append(seconds / rows)
        if not beaten:
            usual.add(seconds)
        self._budget = min(BURST, self._budget + BUDGET)

    def patience_s(self, group: int, rows: int, replica: str | None = None) -> float:
        """After how long to ask a second replica; while nothing is known of the group, after what is long for any.

        What is usual for fewer rows says at most how long these take: as much longer as there are more of them. A
        `replica` that these rows are the share of is given its own time for them.
        """
        size = rows.bit_length()
        usual = self._usual.get((group, size))
        p95_s = usual.p95_s if usual is not None else 0.0
        if not p95_s:
            p95_s = self._guess_s(group, size)
            if not p95_s:
                return OVERDUE_S if self.can_hedge else float("inf")
        if replica in self._row_s:
            p95_s = max(p95_s, rows * _median(self._row_s[replica], 0.0))
        if not self.can_hedge:
            return max(OVERDUE_S, OVERDUE_AFTER * p95_s)
        return max(SHORTEST_S, HEDGE_AFTER * p95_s)

    def _guess_s(self, group: int, size: int) -> float:
        """The 95th percentile of a size that is not known, from the next smaller one, or else the next larger."""
        known = {bits: one.p95_s for (of, bits), one in self._usual.items() if of == group and one.p95_s}
        smaller = max((bits for bits in known if bits < size), default=None)
        if smaller is not None:
            return known[smaller] * 2.0 ** (size - smaller)
        return known[min(known)] if known else 0.0

    @property
    def can_hedge(self) -> bool:
        """Whether the budget has a hedge left."""
        return self._budget >= 1.0

    def hedged(self) -> None:
        """A second replica was asked."""
        self._budget = max(0.0, self._budget - 1.0)

    def forget(self, known: set[str]) -> None:
        """Drop what is known of replicas that left."""
        for table in (self._slowness, self._usual_slowness, self._row_s, self._asked):
            for replica_id in [r for r in table if r not in known]:
                del table[replica_id]


def _median(recent: deque[float] | None, unknown: float) -> float:
    """Of the latest ones; the larger of two."""
    return sorted(recent)[len(recent) // 2] if recent else unknown
