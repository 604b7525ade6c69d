"""What is packed one number after the other is unpacked to the same numbers, whatever they are."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cluster.checkpoint.quantization.scheme import Awq, Gptq, Packed
from experts_service.quantization.unpack import quantized_weight, unpack_awq, unpack_rows
from tests.quantized_checkpoints import awq_words, words

BITS = st.sampled_from([4, 8])


def matrices(
    rows: st.SearchStrategy[int], columns: st.SearchStrategy[int], end: int
) -> st.SearchStrategy[torch.Tensor]:
    """Of integers from 0 and below `end`."""
    shapes = st.tuples(rows, columns)
    drawn = shapes.flatmap(lambda shape: arrays.arrays(np.int32, shape, elements=st.integers(0, end - 1)))
    return drawn.map(torch.from_numpy)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), bits=BITS)
def test_rows_of_any_length(data: st.DataObject, bits: int):
    codes = data.draw(matrices(st.integers(1, 4), st.integers(1, 40), 2**bits))
    unpacked = unpack_rows(words(codes, bits), bits, codes.shape[1])
    assert unpacked.dtype is torch.int8
    assert torch.equal(unpacked.int() + 2 ** (bits - 1), codes)


@settings(max_examples=50, deadline=None)
@given(codes=matrices(st.integers(1, 4), st.integers(1, 5).map(lambda n: 8 * n), 16))
def test_awqs_order(codes: torch.Tensor):
    assert torch.equal(unpack_awq(awq_words(codes)).int() + 8, codes)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), bits=BITS, less_one=st.booleans())
def test_gptqs_zero_points_below_zero_borrow_and_come_back(data: st.DataObject, bits: int, less_one: bool):
    """Two groups of inputs, eight outputs."""
    zeros = data.draw(matrices(st.just(2), st.just(8), 2**bits))
    codes = data.draw(matrices(st.just(16), st.just(8), 2**bits))
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = words(zeros, bits).numpy().view(np.uint32) - np.uint32(ones if less_one else 0)
    parts = {
        "codes": words(codes.t(), bits).t(),
        "scales": torch.ones(2, 8, dtype=torch.float16),
        "zero_points": torch.from_numpy(stored.view(np.int32)),
    }
    scheme = Gptq(bits, 8, act_order=False, symmetric=False, stored_less_one=less_one)
    weight = quantized_weight("w", (8, 16), scheme, parts, torch.float32)
    expected = codes.t() - zeros.t().repeat_interleave(8, dim=1)
    assert torch.equal(weight.dequantize(torch.float32), expected.float())


@settings(max_examples=25, deadline=None)
@given(
    zeros=matrices(st.just(3), st.just(16), 16),
    codes=matrices(st.just(24), st.just(16), 16),
    outputs=st.integers(9, 16),
)
def test_awqs_zero_points_of_any_number_of_outputs(zeros: torch.Tensor, codes: torch.Tensor, outputs: int):
    """What fills up the last word is no output: there is no scale of one, and no room for what it would say."""
    parts = {"codes": awq_words(codes), "scales": torch.ones(3, outputs), "zero_points": awq_words(zeros)}
    weight = quantized_weight("w", (outputs, 24), Awq(8), parts, torch.float32)
    expected = (codes.t() - zeros.t().repeat_interleave(8, dim=1))[:outputs]
    assert weight.shape == (outputs, 24)
    assert torch.equal(weight.dequantize(torch.float32), expected.float())


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=BITS)
def test_packed_zero_points_of_any_number_of_outputs(data: st.DataObject, bits: int):
    outputs = data.draw(st.integers(1, 40))
    zeros = data.draw(matrices(st.just(outputs), st.just(2), 2**bits))
    codes = data.draw(matrices(st.just(outputs), st.just(6), 2**bits))
    parts = {
        "codes": words(codes, bits),
        "scales": torch.ones(outputs, 2),
        "zero_points": words(zeros.t(), bits).t(),
    }
    scheme = Packed(bits, (1, 3), zero_points=True, act_order=False)
    weight = quantized_weight("w", (outputs, 6), scheme, parts, torch.float32)
    assert torch.equal(weight.dequantize(torch.float32), (codes - zeros.repeat_interleave(3, dim=1)).float())


def test_what_would_only_cost_time_is_left_out():
    """Zero points in the middle, and groups of neighbours that are written down."""
    parts = {
        "codes": words(torch.full((16, 8), 3), 4).t(),
        "scales": torch.ones(2, 16),
        "zero_points": words(torch.full((2, 16), 8), 4),
        "input_groups": (torch.arange(8) // 4).int(),
    }
    scheme = Gptq(4, 4, act_order=True, symmetric=False, stored_less_one=False)
    weight = quantized_weight("w", (16, 8), scheme, parts, torch.float32)
    assert weight.zero_points is None
    assert weight.input_groups is None
    assert torch.equal(weight.dequantize(torch.float32), torch.full((16, 8), -5.0))
