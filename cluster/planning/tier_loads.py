"""What the tiers of each expert group have to do, told by the policies that scale them. Plain numbers; knows no Serve.

    expert-2          busy for 0.9 of the time, one replica at most: it lacks one
    expert-2-tier1    no replica at first: gets one when the tier before it has lacked one for `upscale_delay_s`

Loads are parts of the time, and a tier may be many times faster than the one before it: what 5 % of a GPU's time does,
all of a CPU's may be too little for. So what a tier's load is worth is what it took from the one before it when it
had its first replica. Later both have other requests, and their loads tell nothing of each other. A tier that was busy
all the time had more to do than its load says, so then it is worth at least that: less than was learned before is not
believed. It may give its rows back once too early, and has learned by then.

One table a process, that of Serve's controller, where all policies run. They travel there by value, each with a copy of
its module, and come to this one by name.
"""

from __future__ import annotations

from dataclasses import dataclass

Tier = tuple[str, str]  # application and deployment


@dataclass(frozen=True, slots=True)
class TierLoad:
    """Of the replicas of one group on one tier."""

    load: float  # of all of them
    replicas: int  # that run
    lacks_since: float | None  # they cannot carry what there is, or have all died, and there may be no more of them
    has_run: bool


FULL = 0.95  # of the time: whoever is busy for so much of it has more to do, nobody knows how much
NOTHING = TierLoad(0.0, 0, None, False)
SETTLED_S = 15.0  # with replicas, until a tier has taken what it takes: thrice what Serve averages over


class TierLoads:
    """By tier. Used by one thread."""

    def __init__(self) -> None:
        self._tiers: dict[Tier, TierLoad] = {}
        self._began: dict[Tier, tuple[float, TierLoad]] = {}  # when a tier last had nothing, and the one before it then
        self._worth: dict[Tier, float] = {}  # what a part of its load is on the tier before it, as last learned
        self._settled: set[Tier] = set()  # of which that was since their first replica

    def tell(self, tier: Tier, *, load: float, replicas: int, has_enough: bool, now: float) -> None:
        """What a tier has to do at `now`, in seconds; one that has had replicas and has none does not have enough."""
        before = self._tiers.get(tier)
        has_run = replicas > 0 or (before is not None and before.has_run)
        lacks_since = None
        if not has_enough or (has_run and not replicas):
            lacks_since = now if before is None or before.lacks_since is None else before.lacks_since
        self._tiers[tier] = TierLoad(load, replicas, lacks_since, has_run)

    def learn(self, tier: Tier, before: Tier, *, load: float, replicas: int, now: float) -> None:
        """What the load of `tier` is worth on the one before it, once it has settled. Told of each moment."""
        of_before = self._tiers.get(before, NOTHING)
        if not replicas:
            self._settled.discard(tier)
            self._began[tier] = now, of_before
            return
        began, at_first = self._began.setdefault(tier, (now, of_before))
        if tier in self._settled or now - began < SETTLED_S:
            return
        if load:
            worth = max(1.0, (at_first.load - of_before.load) / load)
            if at_first.load >= FULL * at_first.replicas:
                worth = max(worth, self._worth.get(tier, 1.0))
            self._worth[tier] = worth
            self._settled.add(tier)
        else:  # it has taken nothing yet
            self._began[tier] = now, of_before

    def lacks(self, tier: Tier, delay_s: float, now: float) -> bool:
        """Whether a tier has needed more than it may have for so long."""
        of_tier = self._tiers.get(tier)
        return of_tier is not None and of_tier.lacks_since is not None and now - of_tier.lacks_since >= delay_s

    def can_take(self, tier: Tier, after: Tier, load: float, most: float) -> bool:
        """Whether it would carry what the one after it does as well, and each of its replicas at most `most`.

        `load`: of the one after it.
        """
        of_tier = self._tiers.get(tier)
        if of_tier is None or of_tier.lacks_since is not None:
            return False
        if load and after not in self._settled:
            return False
        return of_tier.load + self._worth.get(after, 1.0) * load <= most * of_tier.replicas


LOADS = TierLoads()
