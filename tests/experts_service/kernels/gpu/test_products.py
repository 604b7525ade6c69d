"""Products on a GPU: what they add up to in every format, and bits of a row that depend on nothing but the row.

On a CPU Triton's interpreter runs the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.triton_interpreter  # noqa: F401
from experts_service.kernels.gpu import products
from experts_service.kernels.gpu.matrices import FLOAT8, INT4, INT8, PLAIN, Matrices
from experts_service.kernels.gpu.products import FEW_ROWS, gate_up, multiply, num_parts, num_tiles
from experts_service.quantization.weight import QuantizedWeight, Weight, dense
from tests.experts_service.kernels.broken_rows import check_that_a_broken_row_is_alone
from tests.experts_service.kernels.compiled.test_quantized_matmul import floats_of, weight_of

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16, torch.float16]
MOSTLY_BF16 = [BF16, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (FP32, torch.float16))]
UNITS = {FP32: 2.0**-24, BF16: 2.0**-8, torch.float16: 2.0**-11}  # of what the result is rounded to
# What a matrix is stored in, and how it is kept.
FORMATS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "plain": (None, PLAIN),
    "int8, a scale for each output": ({"bits": 8}, INT8),
    "int8, groups of 32": ({"bits": 8, "group_size": 32, "zero_points": True}, INT8),
    "int8, groups of 20": ({"bits": 8, "group_size": 20}, INT8),
    "int4, a scale for each output": ({"bits": 4}, INT4),
    "int4, groups of 32": ({"bits": 4, "group_size": 32, "zero_points": True}, INT4),
    "int4, groups of 48": ({"bits": 4, "group_size": 48}, INT4),
    "int4, groups of 128": ({"bits": 4, "group_size": 128, "scales_of": BF16}, INT4),
    "int4, act-order": ({"bits": 4, "group_size": 64, "zero_points": True, "shuffled": True}, INT4),
    "int8, act-order": ({"bits": 8, "group_size": 32, "shuffled": True}, INT8),
    "fp8, a scale for each output": ({}, FLOAT8),
    "fp8, blocks of 128": ({"group_size": 128}, FLOAT8),
    "fp8, blocks of 50": ({"group_size": 50}, FLOAT8),
}


def a_weight(name: str, shape: tuple[int, int], dtype: torch.dtype, *, seed: int) -> Weight:
    arguments, kind = FORMATS[name]
    if arguments is None:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if kind != FLOAT8:
        return replace(weight_of(*shape, **arguments, seed=seed), dtype=dtype)
    return replace(floats_of(*shape, **arguments, seed=seed), dtype=dtype)


def on(device: str, weights: Sequence[Weight]) -> list[tuple[Weight]]:
    return [(weight.to(device),) for weight in weights]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends_of(counts: Sequence[int], device: str) -> Tensor:
    return torch.tensor(counts).cumsum(0).int().to(device)


def exactly(weight: Weight) -> Tensor:
    return (weight.dequantize(FP32) if isinstance(weight, QuantizedWeight) else weight).double()


@pytest.mark.parametrize("dtype", MOSTLY_BF16)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_multiplied_with_the_matrix_they_belong_to(device: str, name: str, dtype: torch.dtype) -> None:
    """Nothing is rounded but sums in float32, and the end: small numbers are not rounded to the rows' dtype."""
    weights = [a_weight(name, (37, 150), dtype, seed=seed) for seed in range(3)]
    matrices = Matrices.pack(on(device, weights))
    assert matrices.kind == FORMATS[name][1]
    for counts in (1, 0, 2), (0, 50, 3):
        x = randn(sum(counts), 150, dtype=dtype)
        y = multiply(x.to(device), matrices, ends_of(counts, device)).cpu().double()
        of_matrix = list(zip(x.split(list(counts)), weights, strict=True))
        exact = torch.cat([F.linear(rows.double(), exactly(weight)) for rows, weight in of_matrix])
        sizes = torch.cat([F.linear(rows.double().abs(), exactly(weight).abs()) for rows, weight in of_matrix])
        assert ((y - exact).abs() <= sizes * 160 * UNITS[FP32] + exact.abs() * UNITS[dtype]).all()


@pytest.mark.parametrize("name", ["plain", "int4, groups of 32", "fp8, blocks of 128"])
def test_a_network_rounds_where_the_reference_does(device: str, name: str) -> None:
    w13 = [a_weight(name, (2 * 40, 128), BF16, seed=seed) for seed in range(2)]
    x = randn(21, 128, dtype=BF16) / 16
    matrices, ends = Matrices.pack(on(device, w13)), ends_of((1, 20), device)
    gate, up = multiply(x.to(device), matrices, ends).chunk(2, dim=-1)
    hidden = gate_up(x.to(device), matrices, ends)
    expected = F.silu(gate) * up
    # e^x may differ in the last bit of float32, which seldom is seen after rounding.
    assert (hidden != expected).double().mean() < 0.01
    torch.testing.assert_close(hidden, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("run", [multiply, pytest.param(gate_up, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in FORMATS)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(device: str, name: str, dtype: torch.dtype, run: Any) -> None:
    """Whichever place of whichever tile it gets, and whoever adds up the parts of its sum."""
    width = 1050 if name == "plain" else 2100  # k in parts, the last block short
    matrices = Matrices.pack(on(device, [a_weight(name, (40, width), dtype, seed=seed) for seed in range(2)]))
    most = products.tiles(matrices).many.rows
    many = (FEW_ROWS + 5, most + 1)
    x = randn(sum(many), width, dtype=FP32)
    if device == "cpu":
        # What the interpreter adds up inside a block has an order of NumPy's own, so numbers of a block are few and of
        # one size, and their sums are exact; those of different blocks are not.
        sizes = 2.0 ** torch.randint(-14, 0, (-(-width // 16),), generator=torch.Generator().manual_seed(1))
        x = x.sign() * sizes.repeat_interleave(16)[:width]
    x = x.to(dtype).to(device)
    together = run(x, matrices, ends_of(many, device))
    for before, after in (3, 5), (1, 0), (0, 1), (many[0], most):
        counted = slice(many[0] - before, many[0] + after)
        assert torch.equal(run(x[counted], matrices, ends_of((before, after), device)), together[counted])


def test_one_matrix_needs_no_ends(device: str) -> None:
    weight = a_weight("int4, groups of 32", (37, 96), BF16, seed=0).to(device)
    x = randn(20, 96, dtype=BF16).to(device)
    alone = multiply(x, Matrices.pack([(weight,)]))
    assert torch.equal(alone, multiply(x, Matrices.pack([(weight,), (weight,)]), ends_of((0, 20), device)))
    assert multiply(x[:0], Matrices.pack([(weight,)])).shape == (0, 37)


def test_every_code_of_fp8_is_widened_exactly(device: str) -> None:
    """Normal, subnormal, zero, and of either sign: 254 numbers. What is none makes its output none, and no other."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 2)
    for dtype in DTYPES:
        weight = QuantizedWeight(codes, torch.ones(256, 1), None, 8, 2, dtype).to(device)
        y = multiply(torch.tensor([[1.0, 0.0]], dtype=dtype, device=device), Matrices.pack([(weight,)]))
        assert torch.equal(y[0].cpu().float().nan_to_num(1e9), codes[:, 0].float().nan_to_num(1e9))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(device: str, value: float) -> None:
    """Rows of one tile are columns of one product: a broken one is told by its numbers, and its neighbours go on."""
    matrices = Matrices.pack(on(device, [a_weight("int8, a scale for each output", (64, 32), BF16, seed=0)]))
    check_that_a_broken_row_is_alone(lambda x: multiply(x.to(device), matrices), 32, value)


def test_matrices_that_differ_are_widened_together(device: str) -> None:
    small = a_weight("int4, groups of 32", (40, 128), BF16, seed=0)
    other = a_weight("int8, groups of 32", (40, 128), BF16, seed=1)
    assert Matrices.pack(on(device, [small, small])).kind == INT4
    for unlike in other, dense(other), a_weight("int4, groups of 128", (40, 128), BF16, seed=1):
        matrices = Matrices.pack(on(device, [small, unlike]))
        assert matrices.kind == PLAIN
        assert torch.equal(matrices.weights.cpu(), torch.stack([dense(small), dense(unlike)]))


def test_inputs_that_are_nearly_all_in_one_group_take_no_memory_for_the_empty_ones(device: str) -> None:
    weight = weight_of(32, 512, 4, 32)
    groups = torch.zeros(512, dtype=torch.int32)
    groups[:16] = torch.arange(16)
    assert Matrices.pack(on(device, [replace(weight, input_groups=groups)])).kind == PLAIN


@pytest.mark.parametrize(("bits", "scales_of", "bytes_of_32"), [(8, BF16, 34), (4, BF16, 18), (4, FP32, 20)])
def test_packed_weights_are_as_small_as_is_planned(bits: int, scales_of: torch.dtype, bytes_of_32: int) -> None:
    matrices = Matrices.pack([(weight_of(64, 256, bits, 32, scales_of=scales_of),)])
    assert matrices.scales is not None
    assert matrices.weights.nbytes + matrices.scales.nbytes == 64 * 256 // 32 * bytes_of_32


@pytest.mark.parametrize("tile_rows", [FEW_ROWS, 128])
def test_there_are_as_many_tiles_as_the_worst_case_needs(tile_rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        experts = int(torch.randint(1, 9, (), generator=draw))
        counts = torch.randint(0, 3 * tile_rows, (experts,), generator=draw) * (
            torch.rand(experts, generator=draw) > 0.3
        )
        needed = sum(-(-count // tile_rows) for count in counts.tolist())
        assert needed <= num_tiles(int(counts.sum()), experts, tile_rows)
    assert num_tiles(2, 8, FEW_ROWS) == 2, "one token of two experts"


def test_a_matrix_and_few_rows_keep_a_gpu_busy() -> None:
    """Mixtral 8x7B: w1 and w3, w2, attention's matrices, the head."""
    assert num_parts(2 * 14336, 32, 8, is_plain=True) == 1
    assert num_parts(4096, 112, 8, is_plain=True) == 1
    assert num_parts(4096, 112, 8, is_plain=False) == 4
    assert num_parts(6144, 32, 1, is_plain=True) == 2
    assert num_parts(32000, 32, 1, is_plain=True) == 1
    assert num_parts(32, 2, 1, is_plain=True) == 1, "too few k"
