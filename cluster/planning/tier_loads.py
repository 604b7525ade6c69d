"""What the tiers of each expert group have to do, told by the policies that scale them. Plain numbers; knows no Serve.

    expert-2          busy for 0.9 of the time, one replica at most: it lacks one
    expert-2-tier1    no replica at first: gets one when the tier before it has lacked one for `upscale_delay_s`

Loads are parts of the time, and a tier may be many times faster than the one before it: what 5 % of a GPU's time does,
all of a CPU's may be too little for. So what a tier's load is worth is what it took from the one before it.

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
    lacked: float  # its load when it last lacked replicas


SETTLED_S = (
    15.0  # after so long with replicas what a tier does is what it took from the one before: thrice Serve's average
)


class TierLoads:
    """By tier. Used by one thread."""

    def __init__(self) -> None:
        self._tiers: dict[Tier, TierLoad] = {}
        self._began: dict[Tier, float] = {}  # when a tier had its first replica, since it had none
        self._worth: dict[Tier, float] = {}  # what its load is on the tier before it, since then

    def tell(self, tier: Tier, *, load: float, replicas: int, has_enough: bool, now: float) -> None:
        """What a tier has to do at `now`, in seconds; one that has had replicas and has none does not have enough."""
        before = self._tiers.get(tier)
        has_run = replicas > 0 or (before is not None and before.has_run)
        lacks_since = None
        if not has_enough or (has_run and not replicas):
            lacks_since = now if before is None or before.lacks_since is None else before.lacks_since
        lacked = 0.0 if before is None else before.lacked
        self._tiers[tier] = TierLoad(
            load, replicas, lacks_since, has_run, load if lacks_since is not None and replicas else lacked
        )
        if replicas:
            self._began.setdefault(tier, now)
        else:
            self._began.pop(tier, None)
            self._worth.pop(tier, None)

    def lacks(self, tier: Tier, delay_s: float, now: float) -> bool:
        """Whether a tier has needed more than it may have for so long."""
        of_tier = self._tiers.get(tier)
        return of_tier is not None and of_tier.lacks_since is not None and now - of_tier.lacks_since >= delay_s

    def can_take(self, tier: Tier, after: Tier, load: float, most: float, now: float) -> bool:
        """Whether it would carry what the one after it does as well, and each of its replicas at most `most`.

        `load`: of the one after it.
        """
        of_tier = self._tiers.get(tier)
        if of_tier is None or of_tier.lacks_since is not None:
            return False
        if load and after not in self._worth:
            if now - self._began.get(after, now) < SETTLED_S:
                return False
            self._worth[after] = max(1.0, (of_tier.lacked - of_tier.load) / load)
        return of_tier.load + self._worth.get(after, 1.0) * load <= most * of_tier.replicas


LOADS = TierLoads()
