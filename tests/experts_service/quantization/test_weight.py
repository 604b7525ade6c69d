"""What a quantised matrix stands for, and that whoever multiplies takes it in place of a tensor."""

from __future__ import annotations

import itertools

import pytest
import torch

from experts_service.kernels.experts import Experts, expert_tensor_names
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import SwiGLU
from experts_service.quantization.weight import QuantizedWeight, stacked

FP32, BF16 = torch.float32, torch.bfloat16


def quantized(
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    bits: int = 4,
    zero_points: bool = False,
    shuffled: bool = False,
    dtype: torch.dtype = FP32,
    seed: int = 0,
) -> QuantizedWeight:
    """A random one. `shuffled`: the columns of a group lie anywhere, as with act-order."""
    draw = torch.Generator().manual_seed(seed)
    lowest, end = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = -(-in_features // group_size)
    input_groups = (torch.arange(in_features) // group_size).int()
    return QuantizedWeight(
        codes=torch.randint(lowest, end, (out_features, in_features), generator=draw, dtype=torch.int8),
        scales=torch.rand(out_features, groups, generator=draw) / 2**bits,
        zero_points=torch.randint(lowest, end + 1, (out_features, groups), generator=draw, dtype=torch.int16)
        if zero_points
        else None,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        input_groups=input_groups[torch.randperm(in_features, generator=draw)] if shuffled else None,
    )


def by_the_formula(weight: QuantizedWeight) -> torch.Tensor:
    """One number after the other, in fp64, which holds each of these products whole."""
    widened = torch.empty(weight.shape, dtype=torch.float64)
    for o, i in itertools.product(*map(range, weight.shape)):
        group = i // weight.group_size if weight.input_groups is None else weight.input_groups[i]
        zero_point = 0.0 if weight.zero_points is None else weight.zero_points[o, group].double()
        widened[o, i] = (weight.codes[o, i].double() - zero_point) * weight.scales[o, group].double()
    return widened


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("group_size", "shuffled"), [(24, False), (8, False), (8, True), (10, False)])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_number_is_computed_in_fp32_and_rounded_once(bits, group_size, shuffled, zero_points, dtype):
    weight = quantized(7, 24, group_size, bits=bits, zero_points=zero_points, shuffled=shuffled)
    widened = weight.dequantize(dtype)
    assert widened.is_contiguous()
    assert torch.equal(widened, by_the_formula(weight).float().to(dtype))


def test_fp8_codes_are_numbers_of_their_own():
    codes = torch.randn(6, 8).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes, torch.rand(6, 1), None, 8, 8, FP32)
    assert torch.equal(weight.dequantize(FP32), codes.float() * weight.scales)


def test_a_matrix_is_widened_a_few_rows_at_a_time(monkeypatch):
    whole = quantized(7, 24, 8, zero_points=True)
    expected = whole.dequantize(FP32)
    monkeypatch.setattr("experts_service.quantization.weight._WIDE_BYTES", 4 * 24 * 2)
    assert torch.equal(whole.dequantize(FP32), expected)


@pytest.mark.parametrize(
    ("others", "stays_small"),
    [
        ([{}], True),
        ([{"zero_points": True}, {}], True),
        ([{"shuffled": True}], False),
        ([{"bits": 8}], False),
        ([{"group_size": 12}], False),
    ],
)
def test_what_lies_below_one_another_stays_small_where_it_is_alike(others, stays_small):
    weights = [quantized(5, 24, 8, seed=9)]
    weights += [quantized(3, 24, **{"group_size": 8, **how}, seed=i) for i, how in enumerate(others)]
    together = stacked(weights)
    assert isinstance(together, QuantizedWeight) is stays_small
    widened = together.dequantize(FP32) if isinstance(together, QuantizedWeight) else together
    assert torch.equal(widened, torch.cat([weight.dequantize(FP32) for weight in weights]))


def test_small_numbers_below_a_plain_matrix_are_widened():
    weight, plain = quantized(5, 24, 8), torch.randn(3, 24)
    assert torch.equal(stacked([weight, plain]), torch.cat([weight.dequantize(FP32), plain]))


def test_whoever_multiplies_takes_one_in_place_of_a_tensor():
    """In fp32 the bits are those of the widened matrices."""
    w1, w2, w3 = (quantized(*s, 16, seed=i) for i, s in enumerate([(48, 32), (32, 48), (48, 32)]))
    d1, d2, d3 = (weight.dequantize(FP32) for weight in (w1, w2, w3))
    x = torch.randn(5, 32)
    assert torch.equal(Linear(w1)(x), Linear(d1)(x))
    for fused in (True, False):
        network, widened = (SwiGLU(*w, fused=fused) for w in ((w1, w2, w3), (d1, d2, d3)))
        assert torch.equal(network(x), widened(x))


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_take_them(grouped):
    shapes = dict(zip(expert_tensor_names(0, 3), [(48, 32), (32, 48), (48, 32)], strict=True))
    small = {name: quantized(*shape, 16, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    wide = {name: weight.dequantize(FP32) for name, weight in small.items()}
    rows = torch.randn(6, 32)
    answers = [Experts([3], [weights], grouped=grouped)(0, rows, [6]) for weights in (small, wide)]
    if grouped:  # a scale multiplies the sum of its group, not each weight
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(*answers)
