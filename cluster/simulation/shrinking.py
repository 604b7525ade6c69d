"""The shortest scenario that shows the same: requests and faults are left out while it still does (delta debugging)."""

from __future__ import annotations

from cluster.simulation.faults import Fault
from cluster.simulation.gateway import Arrival
from cluster.simulation.scenario import Outcome, Scenario, run, scenario, without

MOST_RUNS = 200


def shrunk(given: Scenario) -> tuple[Scenario, Outcome]:
    """Leaves out ever smaller parts of what is given. Something else that does not hold counts as well."""
    outcome = run(given)
    assert outcome.violation is not None, "there is something to show"
    kept: list[Arrival | Fault] = sorted([*given.arrivals, *given.faults], key=lambda one: one.at)
    kept = [one for one in kept if one.at <= outcome.at]
    given = without(given, kept)
    runs, size = 0, max(1, len(kept) // 2)
    while runs < MOST_RUNS:
        start, smaller = 0, False
        while start < len(kept) and runs < MOST_RUNS:
            fewer = kept[:start] + kept[start + size :]
            runs += 1
            attempt = run(without(given, fewer))
            if attempt.violation is not None:
                kept = [one for one in fewer if one.at <= attempt.at]
                given, outcome, smaller = without(given, kept), attempt, True
            else:
                start += size
        if size == 1 and not smaller:
            break
        size = max(1, size // 2)
    return given, run(given)


def explained(seed: int) -> str:
    """What a seed shows: its violation, what is needed for it, and the last events before it."""
    given, outcome = shrunk(scenario(seed))
    lines = [f"seed {seed}: after {outcome.at:.3f} s: {outcome.violation}", "with these requests and faults alone:"]
    needed: list[Arrival | Fault] = sorted([*given.arrivals, *given.faults], key=lambda one: one.at)
    lines += [f"    {one}" for one in needed]
    lines += ["what went wrong:", *(f"    {one}" for one in outcome.happened)]
    lines += ["the last events:", *(f"    {one}" for one in outcome.last_events)]
    return "\n".join(lines)
