"""Our own matmuls: exact sums, and bits of a row that depend on nothing but the row."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts_service.kernels.compiled import jit
from experts_service.kernels.compiled.routine import Routine, num_threads, take_run
from experts_service.kernels.kernel import Kernel, available
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import PackedSwiGLUs, SwiGLU
from tests.experts_service.kernels.broken_rows import check_that_a_broken_row_is_alone, randn

if jit.AVAILABLE:
    from numba import carray

    from experts_service.kernels.compiled.jit import pointer

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

OWN = [kernel for kernel in available() if kernel.is_own]
SHAPES = [(64, 32), (96, 40), (7, 13), (300, 130), (1024, 512)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_float64_rounded(kernel: Kernel, shape: tuple[int, int]) -> None:
    weight, x = randn(*shape), randn(19, shape[1], seed=1)
    exact = F.linear(x.double(), weight.double())
    bound = F.linear(x.double().abs(), weight.double().abs()) * shape[1] * 2.0**-24  # of sums in float32
    assert ((Linear(weight, kernel)(x).double() - exact).abs() <= bound + exact.abs() * 2.0**-8).all()


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_row_is_the_same_alone_in_any_batch_and_on_any_number_of_threads(
    kernel: Kernel, shape: tuple[int, int]
) -> None:
    """Greedy answers of one stream changed with the seven others: a library sums one row in another order than four."""
    linear, x = Linear(randn(*shape), kernel), randn(64, shape[1], seed=1)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in torch.get_num_threads(), 2, 5:
        torch.set_num_threads(count)
        for rows in range(1, 65):
            assert torch.equal(linear(x[:rows]), alone[:rows])
        for first, last in ((1, 4), (3, 20), (17, 64)):
            assert torch.equal(linear(x[first:last]), alone[first:last])


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.usefixtures("threads")
def test_several_threads_share_one_matrix_and_write_the_same(kernel: Kernel) -> None:
    """Large enough that threads are woken: each takes panels as it comes to them."""
    weight, x = randn(4100, 1024), randn(5, 1024, seed=1)
    torch.set_num_threads(1)
    alone = Linear(weight, kernel)(x)
    torch.set_num_threads(4)
    assert num_threads(weight.nbytes, 5 * weight.numel()) > 1
    for _ in range(20):
        assert torch.equal(Linear(weight, kernel)(x), alone)


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.usefixtures("threads")
def test_no_thread_begins_with_w2_before_all_have_done_with_w1_and_w3(kernel: Kernel) -> None:
    """More threads than cores, so that some are put off their core with a part of what w2 reads undone."""
    weights = [tuple(randn(*shape, seed=i) for shape in ((1500, 256), (256, 1500), (1500, 256))) for i in range(3)]
    networks, counts = PackedSwiGLUs.pack(weights, kernel), (2, 1, 5)
    assert networks is not None
    x = randn(sum(counts), 256, seed=9)
    torch.set_num_threads(1)
    alone = networks(x, counts, torch.empty_like(x))
    torch.set_num_threads(6)
    assert num_threads(3 * weights[0][0].nbytes, 0) > 1
    for _ in range(50):
        assert torch.equal(networks(x, counts, torch.empty_like(x)), alone)


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (33, 45), (128, 300)])
def test_a_network_rounds_where_the_reference_does(kernel: Kernel, hidden: int, intermediate: int) -> None:
    w1, w3, w2 = randn(intermediate, hidden), randn(intermediate, hidden, seed=1), randn(hidden, intermediate, seed=2)
    x = randn(40, hidden, seed=3)
    gate, up = Linear(w1, kernel)(x), Linear(w3, kernel)(x)
    expected = Linear(w2, kernel)(F.silu(gate) * up)
    network = SwiGLU(w1, w2, w3, fused=False, kernel=kernel)
    answers = network(x)
    # Our e^x and torch's differ in the last bit of float32, which seldom is seen after rounding.
    assert (answers != expected).double().mean() < 0.01
    torch.testing.assert_close(answers.float(), expected.float(), rtol=2**-7, atol=expected.abs().max().item() * 2**-7)
    assert torch.equal(answers, torch.cat([network(row[None]) for row in x]))


@pytest.mark.parametrize("kernel", OWN)
def test_an_expert_does_not_see_the_rows_of_another(kernel: Kernel) -> None:
    weights = [(randn(48, 32, seed=i), randn(32, 48, seed=i + 10), randn(48, 32, seed=i + 20)) for i in range(3)]
    counts = (2, 0, 5)
    x = randn(7, 32, seed=5)
    networks = PackedSwiGLUs.pack(weights, kernel)
    assert networks is not None
    together = networks(x, counts, torch.empty_like(x))
    alone = [
        SwiGLU(*of_one, fused=False, kernel=kernel)(part) for of_one, part in zip(weights, x.split(counts), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(kernel: Kernel, value: float) -> None:
    network = SwiGLU(randn(64, 32), randn(32, 64, seed=1), randn(64, 32, seed=2), fused=False, kernel=kernel)
    check_that_a_broken_row_is_alone(network, 32, value)


def test_silu_is_torchs_for_every_bf16() -> None:
    """w1 = w3 = the identity: what comes out is silu(x) · x."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & ((every == 0) | (every.abs() > 2.0**-120)) & (every.abs() < 2.0**60)]
    x = F.pad(every, (0, -len(every) % 32)).view(-1, 32)
    identity = torch.eye(32, dtype=torch.bfloat16)
    ours = SwiGLU(identity, identity, identity, fused=False, kernel=Kernel.FMA)(x)
    torch.testing.assert_close(ours, F.silu(x) * x, rtol=2**-7, atol=1e-34)


def test_fma_has_the_same_bits_on_a_cpu_with_shorter_vectors_and_fewer_registers() -> None:
    """Shards of one group may be on machines of different age."""
    program = """
import torch
from experts_service.kernels.compiled import tile
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.swiglu import SwiGLU
def randn(*shape, seed): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
network = SwiGLU(randn(96, 64, seed=0), randn(64, 96, seed=1), randn(96, 64, seed=2), fused=False, kernel=Kernel.FMA)
answers = network(randn(11, 64, seed=3))
print(tile.HEIGHTS[-1], tile.HAS_DOT, answers.view(torch.int16).flatten().tolist())
"""

    def run(**variables: str) -> list[str]:
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.split(maxsplit=2)

    here = run()
    older = run(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+avx,+sse2")
    assert older[:2] == ["2", "False"]
    assert older[2] == here[2]


def test_threads_are_as_many_as_the_work_is_worth() -> None:
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(16)
        assert num_threads(4096, 2048) == 1
        assert 1 < num_threads(3 << 20, 3 << 19) < 8
        assert num_threads(1 << 30, 1 << 29) == 16
        assert num_threads(4096, 1 << 36) == 16
    finally:
        torch.set_num_threads(torch_threads)


@Routine
def _runs(task):
    """Take runs until none is left, and write them down."""
    ends = carray(pointer(task[3]), 1, np.int64)
    count = 0
    while True:
        first, end = take_run(task, task[1], task[2], task[4])
        if first >= end:
            return
        ends[2 * count], ends[2 * count + 1] = first, end
        count += 1


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("number", [0, 1, 2, 5, 224, 10_001])
@pytest.mark.parametrize("most", [0, 1, 16])
def test_runs_are_all_items_once_the_long_ones_first(threads: int, number: int, most: int) -> None:
    """Two threads read panels that were dealt out one by one at 40 GB/s, and those side by side at 57."""
    ends = np.zeros(2 * number + 2, dtype=np.int64)
    _runs.run(1, number, most, ends.ctypes.data, threads)
    runs = [range(*run) for run in ends.reshape(-1, 2).tolist() if any(run)]
    assert [item for run in runs for item in run] == list(range(number))
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True)
    if number > 2 * threads:
        assert lengths[0] == max(1, min(most, number // (2 * threads)))
        assert lengths[-1] == 1
