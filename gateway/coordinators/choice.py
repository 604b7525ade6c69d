"""Chooses the coordinator of a request: the one that has seen its beginning, unless that is much busier than another.

A coordinator's prefix cache is its own, so requests that begin alike have a favourite: the coordinator that wins a
rendezvous hash over their first tokens. Every gateway finds it by itself, and few change when coordinators come
or go. While the favourite is much busier than another, that one is taken. Requests without a favourite go to the less
busy of two, and nothing to a coordinator that is silent, unless all are, nor to one a step of which failed with the
request. Knows ids and counts; knows no Serve.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b

from cluster.messages import Request

PREFIX_TOKENS = 32  # what two prompts must share; a shorter one has no favourite, it is as quickly computed anywhere
MOST_BEHIND = 8  # requests of this process that the favourite may have more than the least busy coordinator


def ranked(
    coordinators: Sequence[str],
    ongoing: Mapping[str, int],
    silent: Collection[str],
    *,
    failed_on: Collection[str] = (),
    prefix: bytes | None = None,
    sample: Callable[[Sequence[str], int], list[str]] = random.sample,
) -> list[list[str]]:
    """Those to try in this order; of two, the less busy one is to be taken, and none that is full.

    `ongoing`: requests that this process has at each of them.
    """
    candidates = coordinators
    for unwanted in silent, failed_on:
        if unwanted:
            candidates = [each for each in candidates if each not in unwanted] or candidates
    two = sample(candidates, min(2, len(candidates)))
    if prefix is None or len(candidates) < 2:
        return [two]
    favourite = max(candidates, key=lambda each: _weight(prefix, each))
    least = min(candidates, key=ongoing.__getitem__)
    if ongoing[favourite] - ongoing[least] >= MOST_BEHIND:
        return [[least], two]
    return [[favourite], two]


def prefix_of(request: object) -> bytes | None:
    """What requests that share a prefix cache's blocks have in common; None for other calls and short prompts."""
    if not isinstance(request, Request) or len(request.prompt_token_ids) < PREFIX_TOKENS:
        return None
    return request.cache_salt.encode() + array("i", request.prompt_token_ids[:PREFIX_TOKENS]).tobytes()


def _weight(prefix: bytes, coordinator: str) -> bytes:
    """The coordinator of the largest digest is the favourite."""
    return blake2b(prefix + coordinator.encode(), digest_size=8).digest()
