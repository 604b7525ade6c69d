"""Jobs run side by side where there are enough of about the same size, in turn otherwise; errors come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from experts_service.kernels.crew import Crew, Job

WAIT_S = 10.0


@pytest.fixture
def crew() -> Iterator[Crew]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray has it while a coordinator loads its experts
    crew = Crew()
    torch.set_num_threads(2)
    yield crew
    crew.close()
    torch.set_num_threads(before)


def test_two_jobs_run_at_the_same_time_on_one_thread_each(crew: Crew) -> None:
    meeting = threading.Barrier(2)
    threads: list[int] = []

    def job() -> None:
        meeting.wait(WAIT_S)  # returns only when both are here
        threads.append(torch.get_num_threads())

    crew.run([(8, job), (8, job)])
    assert threads == [1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("costs", [(8,), (100, 8), (64, 8, 8)])
def test_all_threads_do_one_job_after_the_other_where_one_is_most_of_the_work(
    crew: Crew, costs: tuple[int, ...]
) -> None:
    done: list[tuple[int, int]] = []

    def job(cost: int) -> Job:
        return cost, lambda: done.append((threading.get_ident(), torch.get_num_threads()))

    crew.run([job(cost) for cost in costs])
    assert done == [(threading.get_ident(), 2)] * len(costs)


def test_every_job_is_done_once(crew: Crew) -> None:
    for _ in range(50):
        done: list[int] = []
        crew.run([(8, partial(done.append, i)) for i in range(7)])
        assert sorted(done) == list(range(7))


def test_an_error_is_raised_after_all_have_ended_and_the_crew_goes_on(crew: Crew) -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        crew.run([(8, fail), (8, lambda: done.append("a"))])
    assert torch.get_num_threads() == 2
    crew.run([(8, lambda: done.append("b")), (8, lambda: done.append("c"))])
    assert done[0] == "a"
    assert sorted(done[1:]) == ["b", "c"]
