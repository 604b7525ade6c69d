"""Routines in a chain: each begins when the one before is done, whatever threads there are and whenever they come."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from experts_service.kernels.compiled import jit
from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.routine import Routine, Task

if jit.AVAILABLE:
    from numba import carray

    from experts_service.kernels.compiled.jit import pointer, take

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

SIZE = 5000


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@Routine
def _reverse_and_add(task):
    """out[i] = one more than x[n - 1 - i]; an item is one number, and the first ones take long."""
    n = task[1]
    x, out = carray(pointer(task[2]), n, np.int64), carray(pointer(task[3]), n, np.int64)
    while True:
        i = take(task)
        if i >= n:
            return
        value = x[n - 1 - i]
        for _ in range(2000 if i % 1000 == 0 else 1):
            value = value * 3 // 3
        out[i] = value + 1


@pytest.mark.parametrize(
    ("threads", "turns"), [(1, 10), (2, 60), (6, 60), pytest.param(16, 3000, marks=pytest.mark.long)]
)
def test_each_begins_when_all_of_the_one_before_is_done(threads: int, turns: int) -> None:
    """An item reads what another thread wrote last in the stage before; more threads than cores, so some come late."""
    buffers = [np.zeros(SIZE, np.int64) for _ in range(8)]
    chain = Chain(
        [Task(_reverse_and_add, threads, (SIZE, x.ctypes.data, out.ctypes.data)) for x, out in pairwise(buffers)]
    )
    for turn in range(turns):
        buffers[0][:] = np.arange(SIZE) * turn
        for buffer in buffers[1:]:
            buffer[:] = -1
        chain.run()
        expected = buffers[0] if len(buffers) % 2 else buffers[0][::-1]
        assert np.array_equal(buffers[-1], expected + len(buffers) - 1)


@pytest.mark.parametrize("threads", [1, 6])
def test_one_ends_where_a_task_says_so_and_goes_on_behind_it(threads: int) -> None:
    """All threads leave at the same place: one that went on would wait for those that had gone."""
    buffers = [np.zeros(SIZE, np.int64) for _ in range(4)]
    halts = ctypes.c_int64(1)
    tasks = [Task(_reverse_and_add, threads, (SIZE, x.ctypes.data, out.ctypes.data)) for x, out in pairwise(buffers)]
    tasks[1] = tasks[1]._replace(halts=ctypes.addressof(halts))
    chain = Chain(tasks)
    for _ in range(50):
        buffers[3][:] = halts.value = 1
        assert chain.run()
        assert (buffers[2] == 2).all()
        assert (buffers[3] == 1).all()
        chain.go_on()
        assert (buffers[3] == 3).all()
        buffers[3][:] = halts.value = 0
        chain.run()
        assert (buffers[3] == 3).all()


@pytest.mark.parametrize("threads", [1, 6])
def test_several_may_halt_it_one_after_the_other(threads: int) -> None:
    """As the gates of a step's layers do. What the first wrote of it stays there while those behind it run."""
    buffers = [np.zeros(SIZE, np.int64) for _ in range(5)]
    halts = [ctypes.c_int64(1), ctypes.c_int64(0), ctypes.c_int64(1), ctypes.c_int64(0)]
    chain = Chain(
        [
            Task(_reverse_and_add, threads, (SIZE, x.ctypes.data, out.ctypes.data), halts=ctypes.addressof(said))
            for said, (x, out) in zip(halts, pairwise(buffers), strict=True)
        ]
    )
    for _ in range(20):
        for buffer in buffers[1:]:
            buffer[:] = -1
        assert chain.run()
        assert [buffer[7] for buffer in buffers] == [0, 1, -1, -1, -1]
        assert chain.go_on()
        assert [buffer[7] for buffer in buffers] == [0, 1, 2, 3, -1]
        assert not chain.go_on()
        assert (buffers[4] == 4).all()


def test_tasks_of_several_lengths_and_one_alone() -> None:
    x, out, last = (np.arange(7) for _ in range(3))
    Chain([Task(_reverse_and_add, 1, (7, x.ctypes.data, out.ctypes.data))]).run()
    assert out.tolist() == [7, 6, 5, 4, 3, 2, 1]
    tasks = [
        Task(_reverse_and_add, 2, (7, x.ctypes.data, out.ctypes.data, 0, 0)),
        Task(_reverse_and_add, 1, (3, out.ctypes.data, last.ctypes.data)),
    ]
    Chain(tasks).run()
    assert last.tolist() == [6, 7, 8, 3, 4, 5, 6]
