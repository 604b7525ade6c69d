"""Which coordinators a request is to try, by ids and counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gateway.coordinators.choice import MOST_BEHIND, ranked

COORDINATORS = ("a", "b", "c")
PREFIX = b"of one beginning"


def favourite_of(prefix: bytes, coordinators: Sequence[str] = COORDINATORS) -> str:
    [[favourite], _] = ranked(coordinators, Counter(), (), prefix=prefix)
    return favourite


def test_prefixes_are_spread_and_keep_their_favourite_when_others_go() -> None:
    prefixes = [str(number).encode() for number in range(300)]
    favourites = {prefix: favourite_of(prefix) for prefix in prefixes}
    assert all(80 <= count <= 120 for count in Counter(favourites.values()).values())
    for prefix, favourite in favourites.items():
        remaining = [each for each in COORDINATORS if each != "b"]
        assert favourite_of(prefix, remaining) == favourite or favourite == "b"


def test_a_favourite_gets_more_of_a_burst_but_never_much_more() -> None:
    favourite = favourite_of(PREFIX)
    ongoing: Counter[str] = Counter()
    for _ in range(60):
        [[chosen], _] = ranked(COORDINATORS, ongoing, (), prefix=PREFIX)
        ongoing[chosen] += 1
        assert ongoing[favourite] - min(ongoing[each] for each in COORDINATORS) <= MOST_BEHIND
    assert sorted(ongoing.values()) == [17, 18, 25]
    assert ongoing[favourite] == 25


def test_the_second_try_is_the_less_busy_of_two() -> None:
    def first_two(candidates: Sequence[str], number: int) -> list[str]:
        return list(candidates[:number])

    assert ranked(COORDINATORS, Counter(), (), sample=first_two) == [["a", "b"]]
    [_, two] = ranked(COORDINATORS, Counter(), (), prefix=PREFIX, sample=first_two)
    assert two == ["a", "b"]
    assert ranked(COORDINATORS[:1], Counter(), (), prefix=PREFIX) == [["a"]]


def test_one_that_is_silent_or_failed_is_tried_only_where_there_is_no_other() -> None:
    favourite = favourite_of(PREFIX)
    others = {each for each in COORDINATORS if each != favourite}
    [[chosen], two] = ranked(COORDINATORS, Counter(), {favourite}, prefix=PREFIX)
    assert chosen in others
    assert set(two) == others
    [[chosen], two] = ranked(COORDINATORS, Counter(), (), failed_on=(favourite,), prefix=PREFIX)
    assert chosen in others
    assert set(two) == others
    assert ranked(COORDINATORS, Counter(), set(COORDINATORS), prefix=PREFIX)[0] == [favourite]
    assert ranked(COORDINATORS, Counter(), others, failed_on=(favourite,), prefix=PREFIX) == [[favourite]]
