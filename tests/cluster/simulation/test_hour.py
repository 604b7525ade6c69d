"""A small one of the large fleet: what a simulated minute takes is as much in every minute."""

from __future__ import annotations

import logging
import time

import pytest

from cluster.simulation.hour import large
from cluster.simulation.scenario import Run

FEWEST_EVENTS = 3000  # a second of a core: a tenth of what was measured on a busy machine


def test_a_minute_of_a_fleet_costs_as_much_as_any_other(caplog: pytest.LogCaptureFixture) -> None:
    """All arrivals stood in the queue from the beginning, a timer of every request for its five minutes, and each
    request was remembered: events became dearer the longer a run was."""
    caplog.set_level(logging.ERROR, logger="gateway")  # that attempts fail is what they are for
    sizes, events = [], []
    began = time.process_time()
    for minutes in 1, 2, 3:
        given = large(minutes, groups=2, copies=10, coordinators=6, requests_a_minute=600, faults_a_minute=2.0)
        run = Run(given, watched=False)
        waiting: list[int] = []
        run.queue.at(60.0 * minutes - 1.0, lambda run=run, waiting=waiting: waiting.append(len(run.queue._waiting)))
        outcome = run.outcome()
        assert outcome.violation is None
        sizes += waiting
        events.append(outcome.num_events)
        assert len(run.invariants.clients) <= outcome.num_failed
    first, second, third = events
    assert 0.7 < (third - second) / (second - first) < 1.4
    assert max(sizes) < 1200, "of 1,800 requests, each with a timer"
    assert sum(events) / (time.process_time() - began) > FEWEST_EVENTS
