"""Threads that do independent work side by side, each with its share of the cores. Knows no experts.

Two matrices on two cores, one thread each, are done sooner than one after the other with both: a matmul on several
threads wakes them, waits for the slowest, and does not gain as much as it has threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch

Job = tuple[int, Callable[[], None]]  # its cost, in any unit; what to do

MOST_IDLE = 1.5  # times the mean: where one worker would have more to do than that, all do the jobs in turn, together


def run_in_turn(jobs: Sequence[Job]) -> None:
    """Do one after the other, each with all threads."""
    for _, job in jobs:
        job()


class Crew:
    """All intra-op threads of this process, as one team or as several."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._members: list[threading.Thread] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Do all of them, in any order. Raises what one of them raises, after all have ended."""
        num_threads = torch.get_num_threads()  # of the caller; a coordinator sets it after its experts are loaded
        num_teams = min(len(jobs), num_threads)
        costs = [cost for cost, _ in jobs]
        if num_teams < 2 or max(costs) * num_teams > MOST_IDLE * sum(costs):
            run_in_turn(jobs)
            return
        self._hire(num_teams - 1)
        waiting = deque(job for _, job in sorted(jobs, key=lambda job: -job[0]))
        threads_each = num_threads // num_teams
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            torch.set_num_threads(threads_each)
            try:
                while waiting:
                    try:
                        job = waiting.popleft()
                    except IndexError:  # another one was faster
                        break
                    job()
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

        for _ in range(num_teams - 1):
            self._calls.put(work)
        work()
        torch.set_num_threads(num_threads)
        errors = [ended.get() for _ in range(num_teams)]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads. Idempotent."""
        for _ in self._members:
            self._calls.put(None)
        for member in self._members:
            member.join()
        self._members.clear()

    def _hire(self, number: int) -> None:
        while len(self._members) < number:
            member = threading.Thread(target=self._serve, name="crew", daemon=True)
            member.start()
            self._members.append(member)

    @torch.inference_mode()
    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
