"""A deadline in another process: what is left of it, whatever the clocks of the two say."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace

import pytest

from cluster.deadline import NEVER, Deadline
from tests.programs import said_by


def left_elsewhere(deadline: Deadline) -> list[float]:
    return [float(number) for number in said_by("cluster.deadline_elsewhere", stdin=pickle.dumps(deadline)).split()]


def test_a_host_whose_clocks_are_others_gives_it_as_long() -> None:
    """What travelled was a moment of the gateway's clock: a host an hour ahead refused every request at once."""
    assert left_elsewhere(Deadline.after(60)) == pytest.approx([60, 60], abs=5)
    assert left_elsewhere(Deadline.after(-60)) == pytest.approx([-60, -60], abs=5)
    assert left_elsewhere(NEVER) == [float("inf")] * 2


def test_what_is_left_when_it_is_sent_again_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("cluster.deadline.time", SimpleNamespace(monotonic=lambda: now))
    deadline = Deadline.after(0.2)
    first = pickle.loads(pickle.dumps(deadline))
    now += 0.1
    again = pickle.loads(pickle.dumps(deadline))
    assert again.remaining_s == pytest.approx(0.1)
    assert again.at == pytest.approx(first.at)


def test_a_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    deadline = Deadline.after(60)
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert deadline.remaining_s == pytest.approx(60, abs=5)
