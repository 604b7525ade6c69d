"""Matmuls with weights of 8 and 4 bits: what they add up to, and bits of a row that depend on nothing but the row."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.compiled import jit
from experts_service.kernels.compiled.float8_tile import HAS_FLOAT8
from experts_service.kernels.compiled.quantized_matmul import QuantizedPanels, is_multiplied_here, multiply, pack_alike
from experts_service.kernels.compiled.quantized_rows import quantize_task, row_words
from experts_service.kernels.compiled.quantized_tile import DIGITS
from experts_service.kernels.compiled.routine import num_threads
from experts_service.kernels.kernel import Kernel, available
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import PackedSwiGLUs, SwiGLU
from experts_service.quantization.weight import QuantizedWeight, dense
from tests.experts_service.kernels.broken_rows import check_that_a_broken_row_is_alone, randn

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

BF16 = torch.bfloat16
# Inputs that are no multiple of a block, of a vector, of anything; outputs that fill no panel.
SHAPES = [(64, 256), (33, 130), (300, 1000), (7, 13), (1, 8)]
GROUPS = [None, 32, 64, 128, 20]


def weight_of(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    shuffled: bool = False,
    scales_of: torch.dtype = torch.float32,
    seed: int = 0,
) -> QuantizedWeight:
    """A random one. `shuffled`: the columns of a group lie anywhere, as with act-order."""
    draw = torch.Generator().manual_seed(seed)
    lowest, end = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = 1 if group_size is None else -(-in_features // group_size)
    zeros = torch.randint(lowest, end + 1, (out_features, groups), generator=draw, dtype=torch.int16)
    order = torch.randperm(in_features, generator=draw)
    return QuantizedWeight(
        codes=torch.randint(lowest, end, (out_features, in_features), generator=draw, dtype=torch.int8),
        scales=((torch.rand(out_features, groups, generator=draw) + 0.5) / 2**bits).to(scales_of).float(),
        zero_points=zeros if zero_points else None,
        bits=bits,
        group_size=group_size or in_features,
        dtype=BF16,
        input_groups=(order // group_size).int() if shuffled and group_size else None,
    )


def floats_of(out_features: int, in_features: int, group_size: int | None = None, *, seed: int = 0) -> QuantizedWeight:
    """A random one of FP8, whose codes are of all sizes."""
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-in_features // group_size)
    numbers = torch.randn(out_features, in_features, generator=draw) * 2.0 ** torch.randint(
        -9, 7, (out_features, in_features), generator=draw
    )
    return QuantizedWeight(
        codes=numbers.clamp(-448, 448).to(torch.float8_e4m3fn),
        scales=torch.rand(out_features, groups, generator=draw) + 0.5,
        zero_points=None,
        bits=8,
        group_size=group_size or in_features,
        dtype=BF16,
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_sums_are_those_of_the_widened_weights(
    bits: int, group_size: int | None, zero_points: bool, shuffled: bool
) -> None:
    """A row's numbers are off by a 32,640th of their block's largest at most: less than what bf16 rounds off."""
    for (out_features, in_features), dtype in zip(SHAPES, itertools.cycle((torch.float32, BF16)), strict=False):
        how = {"zero_points": zero_points, "shuffled": shuffled, "scales_of": dtype}
        weight = weight_of(out_features, in_features, bits, group_size, **how)
        linear, widened = Linear(weight), weight.dequantize(torch.float32).double()
        for rows in (0, 1, 3, 19):
            x = randn(rows, in_features, seed=rows)
            y, exact = linear(x), F.linear(x.double(), widened)
            assert y.shape == exact.shape
            largest = x.double().abs().amax(1, keepdim=True)
            bound = largest / 32_640 * widened.abs().sum(1) + 2.0**-18 * F.linear(x.double().abs(), widened.abs())
            assert ((y.double() - exact).abs() <= bound + 2.0**-8 * exact.abs()).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_whole_numbers_add_up_exactly(bits: int, group_size: int | None) -> None:
    """Scales of 1: nothing has to be rounded before the end."""
    weight = weight_of(96, 512, bits, group_size, zero_points=True)
    weight.scales.fill_(1.0)
    x = torch.randint(-100, 101, (5, 512), generator=torch.Generator().manual_seed(1)).to(BF16)
    exact = F.linear(x.double(), weight.dequantize(torch.float32).double())
    assert torch.equal(Linear(weight)(x), exact.to(BF16))


def test_rows_keep_all_digits_of_what_is_more_than_a_128th_of_the_largest() -> None:
    x = torch.cat([randn(1, 60, seed=3), torch.tensor([[255.0, -255.0, 2.0, -254.0]], dtype=BF16)], dim=1)
    words = torch.empty(row_words(32, 2), dtype=torch.int32)
    quantize_task(x, 32, 2, words).run()
    scales, sums = words[32:34].view(torch.float32), words[34:]
    numbers = integers_of(words[:32], 32)
    assert torch.equal(numbers.sum(1), sums.long())
    back, blocks = numbers * scales[:, None].double(), x.double().view(2, 32)
    largest = blocks.abs().amax(1, keepdim=True)
    errors = (back - blocks).abs()
    assert not errors[blocks.abs() > largest / 128].any()
    assert (errors <= largest / 32_640).all()


def integers_of(words: Tensor, block: int) -> Tensor:
    """Of each block [blocks, block], as quantized_rows.py lays them out here."""
    if DIGITS:
        upper, lower = words.view(torch.int8).long().view(-1, 2, block).unbind(1)
        return 256 * upper + lower
    pairs = words.view(torch.int16).long().view(-1, 2, block // 4, 2)  # [blocks, even or odd, fours, of them]
    return pairs.permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("largest", [2.0**-112, 3.3e38])
def test_rows_may_be_as_small_and_as_large_as_bf16_is(largest: float) -> None:
    weight = weight_of(32, 64, 8, 32)
    weight.scales.fill_(2.0**-14)
    x = torch.full((1, 64), largest, dtype=BF16) * torch.tensor([0.5, -0.25] * 32, dtype=BF16)
    expected = F.linear(x.double(), weight.dequantize(torch.float32).double()).to(BF16)
    torch.testing.assert_close(Linear(weight)(x).float(), expected.float(), rtol=2**-7, atol=2.0**-126)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32, 20])
@pytest.mark.usefixtures("threads")
def test_a_row_is_the_same_alone_in_any_batch_and_on_any_number_of_threads(bits: int, group_size: int | None) -> None:
    """Whoever asks for one token gets the one that comes with others: torch's kernels for such weights differ there."""
    linear = Linear(weight_of(300, 130, bits, group_size, zero_points=True, shuffled=group_size == 20))
    x = randn(40, 130, seed=1)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in range(1, 41):
            assert torch.equal(linear(x[:rows]), alone[:rows])
        assert torch.equal(linear(x[3:20]), alone[3:20])


@pytest.mark.usefixtures("threads")
def test_several_threads_share_one_matrix_and_write_the_same() -> None:
    """Large enough that threads are woken: each takes panels, and rows, as it comes to them."""
    weight, x = weight_of(4100, 1024, 4, 32), randn(70, 1024, seed=1)
    linear = Linear(weight)
    torch.set_num_threads(1)
    alone = linear(x)
    torch.set_num_threads(4)
    assert num_threads(weight.codes.numel() // 2, 70 * weight.codes.numel()) > 1
    for _ in range(5):
        assert torch.equal(linear(x), alone)


def test_matrices_of_one_call_get_their_own_rows_in_their_own_order() -> None:
    """Act-order differs from expert to expert, and so may bits, scales and zero points."""
    weights = [
        weight_of(50, 96, 8, 32, seed=1, shuffled=True),
        weight_of(50, 96, 4, 32, seed=2),
        weight_of(50, 96, 4, 32, seed=3, shuffled=True, zero_points=True),
        weight_of(50, 96, 4, 32, seed=4, scales_of=BF16),
    ]
    panels = pack_alike(weights)
    assert panels is not None
    counts = (3, 0, 2, 9)
    x = randn(sum(counts), 96, seed=9)
    y = torch.empty(len(x), 50, dtype=BF16)
    multiply(x, panels, counts, y)
    parts = zip(x.split(counts), weights, strict=True)
    assert torch.equal(y, torch.cat([Linear(weight)(part) for part, weight in parts]))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (40, 45), (128, 300)])
def test_a_network_rounds_where_the_reference_does(bits: int, hidden: int, intermediate: int) -> None:
    shapes = [(intermediate, hidden), (hidden, intermediate), (intermediate, hidden)]
    w1, w2, w3 = (weight_of(*shape, bits, 32, seed=i, zero_points=i == 2) for i, shape in enumerate(shapes))
    x = randn(20, hidden, seed=3) / 4
    expected = Linear(w2)(F.silu(Linear(w1)(x)) * Linear(w3)(x))
    network = SwiGLU(w1, w2, w3, fused=False)
    answers = network(x)
    # Our e^x and torch's differ in the last bit of float32, which seldom is seen after rounding.
    assert (answers != expected).double().mean() < 0.01
    torch.testing.assert_close(answers.float(), expected.float(), rtol=2**-7, atol=expected.abs().max().item() * 2**-7)
    assert torch.equal(answers, torch.cat([network(row[None]) for row in x]))


FLOAT8 = pytest.mark.skipif(not HAS_FLOAT8, reason="this CPU does not widen float16")
OWN = [kernel for kernel in available() if kernel.is_own]


@FLOAT8
@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("group_size", [None, 32, 50])
def test_sums_of_fp8_are_those_of_the_widened_weights(kernel: Kernel, group_size: int | None) -> None:
    """Nothing is rounded but products and sums in float32, and the end."""
    for out_features, in_features in (64, 800), (33, 1600), (300, 3200):
        weight = floats_of(out_features, in_features, group_size)
        assert is_multiplied_here(weight)
        linear, widened = (
            Linear(weight, kernel),
            weight.codes.double() * weight.scales.double().repeat_interleave(weight.group_size, dim=1),
        )
        for rows in (0, 1, 3, 8, 19):
            x = randn(rows, in_features, seed=rows)
            exact = F.linear(x.double(), widened)
            bound = F.linear(x.double().abs(), widened.abs()) * (in_features + 8) * 2.0**-24
            assert ((linear(x).double() - exact).abs() <= bound + 2.0**-8 * exact.abs()).all()


@FLOAT8
@pytest.mark.parametrize("kernel", OWN)
def test_every_code_of_fp8_is_widened_exactly(kernel: Kernel) -> None:
    """Normal, subnormal, zero, and of either sign: 254 numbers. What is none makes its output none, and no other."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 2)
    y = Linear(QuantizedWeight(codes, torch.ones(256, 1), None, 8, 2, BF16), kernel)(
        torch.tensor([[1.0, 0.0]], dtype=BF16)
    )
    assert torch.equal(y[0].float().nan_to_num(1e9), codes[:, 0].float().nan_to_num(1e9))
    assert y[0].isnan().sum() == 2


@FLOAT8
@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.usefixtures("threads")
def test_a_row_times_fp8_is_the_same_alone_and_in_any_batch(kernel: Kernel, group_size: int | None) -> None:
    linear, x = Linear(floats_of(300, 128, group_size), kernel), randn(40, 128, seed=1)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in range(1, 41):
            assert torch.equal(linear(x[:rows]), alone[:rows])
        assert torch.equal(linear(x[3:20]), alone[3:20])


@FLOAT8
@pytest.mark.parametrize("kernel", available())
def test_a_network_of_fp8_rounds_where_the_reference_does(kernel: Kernel) -> None:
    w1, w2, w3 = (floats_of(*shape, 32, seed=i) for i, shape in enumerate([(96, 64), (64, 96), (96, 64)]))
    x = randn(20, 64, seed=3) / 64
    expected = Linear(w2, kernel)(F.silu(Linear(w1, kernel)(x)) * Linear(w3, kernel)(x))
    packed = PackedSwiGLUs.pack([(w1, w2, w3), (w3, w2, w1)], kernel)
    assert packed is not None
    answers = packed(x, (20, 0), torch.empty_like(x))
    assert (answers != expected).double().mean() < 0.01
    torch.testing.assert_close(answers.float(), expected.float(), rtol=2**-7, atol=expected.abs().max().item() * 2**-7)
    assert PackedSwiGLUs.pack([(w1, w2, w3), networks((True,) * 3)[0]], kernel) is None


@FLOAT8
def test_fp8_takes_a_byte_a_weight() -> None:
    panels = QuantizedPanels.pack(floats_of(64, 256))
    assert (panels.codes.nbytes, panels.scales.nbytes) == (64 * 256, 64 * 4)


def networks(*of_each: Sequence[bool]) -> list[tuple[Tensor | QuantizedWeight, ...]]:
    """w1, w2 and w3 of each, quantised or not."""
    shapes = [(48, 32), (32, 48), (48, 32)]
    made = []
    for number, are_quantized in enumerate(of_each):
        weights = [weight_of(*shape, 4, 16, seed=number + 10 * i) for i, shape in enumerate(shapes)]
        made.append(tuple(w if small else dense(w) for w, small in zip(weights, are_quantized, strict=True)))
    return made


@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("small", list(itertools.product((False, True), repeat=3)))
def test_any_matrix_of_a_network_may_be_left_as_it_is(kernel: Kernel, small: tuple[bool, ...]) -> None:
    """What `ignore` names stays in bf16, be it one matrix of three."""
    x = randn(5, 32, seed=5) / 4
    (weights,) = networks(small)
    (widened,) = networks((False,) * 3)
    answers, expected = (SwiGLU(*w, fused=False, kernel=kernel)(x) for w in (weights, widened))
    torch.testing.assert_close(answers.float(), expected.float(), rtol=2**-5, atol=expected.abs().max().item() * 2**-6)


@pytest.mark.parametrize("kernel", [kernel for kernel in available() if kernel.is_own])
def test_experts_that_differ_are_not_run_in_one_call(kernel: Kernel) -> None:
    """None of them is widened because another one is not quantised."""
    assert PackedSwiGLUs.pack(networks((True,) * 3, (True,) * 3), kernel) is not None
    assert PackedSwiGLUs.pack(networks((False,) * 3, (False,) * 3), kernel) is not None
    assert PackedSwiGLUs.pack(networks((True,) * 3, (False,) * 3), kernel) is None
    assert PackedSwiGLUs.pack(networks((True, False, True), (True, True, True)), kernel) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    w1, w2, w3 = weight_of(64, 32, 8), weight_of(32, 64, 4, 32, seed=1), weight_of(64, 32, 8, seed=2)
    check_that_a_broken_row_is_alone(SwiGLU(w1, w2, w3, fused=False), 32, value)


def test_what_is_multiplied_as_it_is() -> None:
    assert is_multiplied_here(weight_of(4, 8, 8))
    assert not is_multiplied_here(replace(weight_of(4, 8, 8), dtype=torch.float32))
    assert is_multiplied_here(floats_of(4, 8)) is HAS_FLOAT8
    for rest in floats_of(4, 9), floats_of(4, 8, 6), floats_of(4, 15, 5):  # pairs of inputs, whole groups
        assert not is_multiplied_here(rest)
        x = randn(3, rest.shape[1])
        assert torch.equal(Linear(rest)(x), Linear(dense(rest))(x))


def test_a_file_whose_inputs_are_nearly_all_in_one_group_takes_no_memory_for_the_empty_ones() -> None:
    """Each group was filled up to the largest: 64 groups of such a file took 64 times the matrix."""
    weight = weight_of(32, 512, 4, 8)
    groups = torch.zeros(512, dtype=torch.int32)
    groups[:64] = torch.arange(64)
    uneven = replace(weight, input_groups=groups)
    assert not is_multiplied_here(uneven)
    assert torch.equal(Linear(uneven)(randn(3, 512)), Linear(dense(uneven))(randn(3, 512)))


@pytest.mark.parametrize(("bits", "scales_of", "bytes_of_32"), [(8, BF16, 34), (4, BF16, 18), (4, torch.float32, 20)])
def test_packed_weights_are_as_small_as_they_were(bits: int, scales_of: torch.dtype, bytes_of_32: int) -> None:
    """Of four bits two are in a byte; scales take two bytes where they have no more digits."""
    panels = QuantizedPanels.pack(weight_of(64, 256, bits, 32, scales_of=scales_of))
    assert panels.codes.nbytes + panels.scales.nbytes == 64 * 256 // 32 * bytes_of_32


@pytest.mark.parametrize(
    ("cpu", "features"),
    [
        ("haswell", "+avx2,+fma,+f16c,+avx,+sse2"),
        pytest.param("nehalem", "+sse4.2,+sse2", marks=pytest.mark.long),  # the way of any other CPU
    ],
)
def test_a_row_has_the_same_bits_on_a_cpu_that_multiplies_in_another_way(cpu: str, features: str) -> None:
    """Shards of one group may be on machines of different age."""
    program = """
import torch
from experts_service.kernels.compiled import quantized_tile
from experts_service.kernels.compiled.float8_tile import HAS_FLOAT8
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.linear import Linear
from tests.experts_service.kernels.compiled.test_quantized_matmul import floats_of, randn, weight_of
x = randn(7, 200, seed=3)
x[1] *= 2.0**-125
print(quantized_tile.DIGITS)
for how in (8, None), (8, 32), (4, 32), (4, 20):
    print(Linear(weight_of(40, 200, *how, zero_points=how[1] == 32))(x).view(torch.int16).tolist())
if HAS_FLOAT8:
    for group_size in None, 40:
        print(Linear(floats_of(40, 200, group_size), Kernel.FMA)(x).view(torch.int16).tolist())
"""

    def run(**variables: str) -> list[str]:
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    here = run()
    older = run(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    assert older[0] == "False"
    assert older[1:] == here[1 : len(older)]
    assert len(older) == 5 + 2 * ("f16c" in features)
