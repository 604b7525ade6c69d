"""python -m cluster.simulation 17 …: runs seeds, and tells of each that shows a fault what is needed to show it."""

from __future__ import annotations

import logging
import sys
import time

from cluster.simulation.scenario import run, scenario
from cluster.simulation.shrinking import explained


def main(arguments: list[str]) -> int:
    """Seeds, and ranges of them. Returns 1 where one shows a fault."""
    logging.getLogger("gateway").setLevel(logging.ERROR)  # that attempts fail is what they are for
    seeds: list[int] = []
    for argument in arguments:
        first, _, last = argument.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    failed = 0
    for seed in seeds:
        began = time.process_time()
        outcome = run(scenario(seed))
        seconds = time.process_time() - began
        if outcome.violation is None:
            print(
                f"seed {seed}: {outcome.num_requests} requests, {outcome.num_failed} failed, {outcome.num_tokens} "
                f"tokens, {outcome.num_faults} faults, {outcome.num_attempts} attempts, {outcome.num_answers} answers, "
                f"{outcome.num_hedges} hedges, {outcome.num_events} events, {seconds:.2f} s"
            )
        else:
            failed += 1
            print(explained(seed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
