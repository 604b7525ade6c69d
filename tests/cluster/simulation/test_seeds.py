"""Seeds: whole fleets under simulated time with faults, in which everything that has to hold is looked at each event.

`python -m cluster.simulation SEED` tells of one that fails what is needed to show it.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from cluster.simulation.scenario import run, scenario
from cluster.simulation.shrinking import explained
from tests.cluster.simulation.mutations import MUTATIONS, Mutation

SEEDS = 160  # of `make test`: 20 to 30 seconds of a core
CHUNK = 20

NAMED = {  # what each of them found
    118: "a lane was kept whose replica left while it owed an answer",
    199: "a replica whose answer was not finite was asked again while the other one was about to be connected",
    209: "streams of a coordinator that was cut off from the experts failed, though another one could go on",
    213: "the same where some had no token yet",
    384: "the imitated Serve replaced a gateway where no node was left, and ended",
    1697: "a stream of a gateway that was cut off with one coordinator was given up, though it was so for a moment",
    2410: "the same where that coordinator was asked twice, as if another one had said so as well",
    3657: "a replica whose answer was not finite was asked again as a hedge for the other one",
    8806: "rows that were posted together were all hedged, with a budget for one",
    17135: "what failed in one microbatch was forgotten where another one failed the step",
    17325: "a gateway that was stopped and went on had streams left when the run had ended",
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """That attempts fail is what they are for. Only here: others of this process look for warnings."""
    caplog.set_level(logging.ERROR, logger="gateway")


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_what_has_to_hold_holds_in_every_seed(first: int) -> None:
    failed = [seed for seed in range(first, first + CHUNK) if run(scenario(seed)).violation is not None]
    assert not failed, "\n\n".join(map(explained, failed))


@pytest.mark.parametrize("seed", NAMED, ids=lambda seed: NAMED[seed].replace(" ", "-"))
def test_what_a_seed_has_found_is_mended(seed: int) -> None:
    assert run(scenario(seed)).violation is None, explained(seed)


def test_a_seed_is_the_same_run_in_every_process() -> None:
    program = "from cluster.simulation.scenario import run, scenario; print([run(scenario(s)).digest for s in (1, 2)])"
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert told == {str([run(scenario(seed)).digest for seed in (1, 2)])}


def test_a_fault_is_told_with_its_seed_and_with_no_more_than_shows_it() -> None:
    """A hedge's loser that stays posted needs one slow answer: no more than a request and a fault or two are told."""
    [mutation] = [one for one in MUTATIONS if one.name == "the loser of a hedge stays posted"]
    with mutation.applied():
        seed = next(seed for seed in range(SEEDS) if run(scenario(seed)).violation is not None)
        text = explained(seed)
    assert text.startswith(f"seed {seed}: after ")
    assert "an attempt of it is posted" in text
    needed = text.split("what went wrong:")[0].splitlines()[2:]
    assert 1 <= len(needed) < len(scenario(seed).arrivals) / 2
    assert run(scenario(seed)).violation is None


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_fault_of_the_decisions_is_noticed(mutation: Mutation) -> None:
    """By the seeds of `make test`."""
    with mutation.applied():
        assert any(run(scenario(seed)).violation is not None for seed in range(SEEDS)), mutation.name


@pytest.mark.long
def test_more_seeds() -> None:
    """An hour of a core."""
    failed = [seed for seed in range(SEEDS, SEEDS + 18_000) if run(scenario(seed)).violation is not None]
    assert not failed, "\n\n".join(map(explained, failed[:5]))
