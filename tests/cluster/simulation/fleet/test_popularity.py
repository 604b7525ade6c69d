"""Chances of experts: a row always asks for `top_k` different ones, however they are skewed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.simulation.fleet.popularity import EPOCH_S, Popularity, spread


def test_chances_are_in_proportion_as_far_as_they_can_be() -> None:
    assert spread([1, 1, 1, 1], 2) == pytest.approx([0.5] * 4)
    assert spread([3, 1, 1, 1], 2) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3]), "no row asks for one twice"


@given(st.lists(st.floats(0.001, 1e6), min_size=8, max_size=64), st.integers(1, 8))
def test_a_row_asks_for_as_many_as_it_does(weights: list[float], top_k: int) -> None:
    chances = spread(weights, top_k)
    assert sum(chances) == pytest.approx(top_k)
    assert max(chances) <= 1 + 1e-9
    in_order = [chance for _, chance in sorted(zip(weights, chances, strict=True))]
    assert all(more - less >= -1e-9 for less, more in pairwise(in_order)), "who is asked for more has no smaller chance"


def test_skew_is_the_same_in_all_layers_or_another_in_each() -> None:
    same = Popularity.parse("zipf:1.2", 32, 8, 2, seed=1).chances()
    each = Popularity.parse("zipf:1.2:layers", 32, 8, 2, seed=1).chances()
    assert same.shape == each.shape == (32, 8)
    assert (same == same[0]).all()
    assert np.allclose(np.sort(each, axis=1), np.sort(same, axis=1)), "each layer is as skewed"
    assert each.sum(axis=0).max() < 0.7 * same.sum(axis=0).max(), "over layers it evens out"


def test_what_drifts_goes_slowly_from_one_order_to_another() -> None:
    drifting = Popularity.parse("zipf:1.0:drift=4", 2, 8, 2, seed=1)
    epochs = [drifting.epoch(hours * 3600) for hours in (0, 2, 4)]
    assert epochs == [0, round(2 * 3600 / EPOCH_S), round(4 * 3600 / EPOCH_S)]
    start, half, end = (drifting.chances(epoch)[0] for epoch in epochs)
    assert not np.allclose(start, end)
    assert half.max() < start.max(), "half-way it is both"
    assert np.allclose(np.sort(start), np.sort(end))
    assert Popularity.parse("zipf:1.0", 2, 8, 2, seed=1).epoch(1e6) == 0


def test_what_a_server_counted_is_used() -> None:
    counted = Popularity(3, 4, 1, counted=(1.0, 1.0, 2.0, 4.0))
    assert counted.chances()[2] == pytest.approx([0.125, 0.125, 0.25, 0.5])


@pytest.mark.parametrize("text", ["zipf", "zipf:x", "zipf:-1", "zipf:1:layer", "even", "zipf:1:drift=x", "uniform:1"])
def test_what_is_no_popularity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--popularity"):
        Popularity.parse(text, 2, 8, 2, 0)
