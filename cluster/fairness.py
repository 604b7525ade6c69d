"""Who is refused where a bound is reached: those who hold most. Knows counts; knows not of what."""

from __future__ import annotations

from collections.abc import Mapping


def is_refused(held: Mapping[str, int], tenant: str, bound: int) -> bool:
    """Whether one more is too many for `tenant`, where each tenant holds so many of what is bounded.

    One alone may hold all of it. When all is taken, a tenant still gets what would be its even share, so that nobody
    is kept out by another's burst: with N tenants at most bound · (1 + 1/2 + … + 1/N) are held, or one each if
    N is larger than the bound.
    """
    if sum(held.values()) < bound:
        return False
    mine = held.get(tenant, 0)
    num_tenants = sum(count > 0 for count in held.values()) + (mine == 0)
    return mine >= max(1, bound // num_tenants)
