"""The sampler of GPUs: by values on CPU tensors, against the compiled one; and that it never waits for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts_service.device import upload
from experts_service.kernels.compiled import jit
from router_service.sampling import draw as draw_module
from router_service.sampling.device_draw import choose
from router_service.sampling.sampler import Sampler
from router_service.sampling.tokens import NOT_FINITE, NOT_READY
from tests.fake_gpu import DEVICE, fake_gpu
from tests.router_service.requests import make_sequence
from tests.router_service.sampling.test_sampler import EOS, PARAMETERS, TOKENS, VOCABULARY

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")
SAMPLER = Sampler(frozenset({EOS}))


class InDoubt(Exception):
    """float32 could round either way."""


def raise_in_doubt(*_):
    raise InDoubt


def on_device(values, sequences):
    """What the GPU's way makes of CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "AVAILABLE", False)
        return SAMPLER._launch_on_device(values, sequences, late=()).wait()


@given(
    st.lists(st.tuples(PARAMETERS, TOKENS, TOKENS, st.sampled_from([None, 0, 3, 20])), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_a_token_is_that_of_a_cpu_wherever_float32_leaves_no_doubt(rows, scale, is_coarse, seed):
    """And its log-probabilities are: whatever is asked for, whoever else asks, with ties and sums that meet a bound."""
    values = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale
    values = values.round() if is_coarse else values
    sequences = [
        make_sequence(prompt, output=output, seed=seed + i, logprobs=logprobs, **sampling)
        for i, (sampling, prompt, output, logprobs) in enumerate(rows)
    ]
    together = on_device(values, sequences)
    for row, sequence in enumerate(sequences):
        alone = on_device(values[row : row + 1], [sequence])
        assert alone == ([together.token_ids[row]], [together.logprobs[row]]), "neighbours changed something"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draw_module, "_draw", raise_in_doubt)
            try:
                assert SAMPLER(values[row : row + 1], [sequence]) == alone
            except InDoubt:
                continue


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_in_a_large_vocabulary_too(scale):
    values = torch.randn(24, 20_001, generator=torch.Generator().manual_seed(5)) * scale
    ways = [{"top_p": 0.95}, {"top_p": 0.5, "top_k": 15_000}, {"min_p": 0.02}, {}, {"logprobs": 5}, {"temperature": 0}]
    sequences = [make_sequence([1], seed=i, **{"temperature": 1.0, **ways[i % 6]}) for i in range(24)]
    assert on_device(values, sequences) == SAMPLER(values, sequences)


def test_integers_give_a_number_below_one_a_token_that_may_come():
    """A share of all was rounded up to all of it, and then no token was left."""
    params = [make_sequence([1], temperature=1.0, **ways).request.sampling for ways in ({}, {"top_p": 0.9})]
    values = torch.tensor([[0.0, 1.0, -200.0, -float("inf")], [0.0, 1.0, -200.0, -float("inf")]])
    assert choose(values, params, [1 - 2.0**-53] * 2).tolist() == [1, 0]
    assert choose(values, params, [0.0] * 2).tolist() == [0, 1]


def test_rows_without_a_token_are_told_and_feed_nothing_to_the_next_step_that_no_embedding_has():
    rows = torch.zeros(3, 8)
    rows[1, 3] = float("nan")
    sequences = [make_sequence([1], temperature=1.0) for _ in range(3)]
    tokens = SAMPLER._launch_on_device(rows, sequences, late=sequences[2:])
    assert [token_id for token_id in tokens.wait().token_ids if token_id < 0] == [NOT_FINITE, NOT_READY]
    assert tokens.on_device.min() >= 0


def everything():
    """Sequences that wish all there is, one of them within a grammar."""
    ways = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logprobs": 4},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),), "min_tokens": 4, "stop_token_ids": (5,), "logprobs": 0},
    ]
    sequences = [make_sequence([1, 2], output=[3], seed=i, **way) for i, way in enumerate(ways)]
    mask = np.full(-(-VOCABULARY // 8), 0x55, np.uint8)
    sequences[1].grammar = SimpleNamespace(is_ready=lambda _timeout_s: True, mask=mask)
    return sequences


def test_nothing_waits_for_a_gpu_but_the_one_copy_of_what_the_host_is_told(monkeypatch):
    sequences = everything()
    with fake_gpu(monkeypatch) as counts:
        tokens = SAMPLER.launch(torch.empty(len(sequences), VOCABULARY, device=DEVICE), sequences)
        assert tokens.on_device.device == DEVICE
    assert not counts.waits
    assert counts.copies_to_host == 1
    assert counts.copies_to_device <= 4


def test_a_greedy_step_uploads_nothing(monkeypatch):
    sequences = [make_sequence([1]) for _ in range(64)]
    with fake_gpu(monkeypatch) as counts:
        SAMPLER.launch(torch.empty(64, VOCABULARY, device=DEVICE), sequences)
    assert (counts.copies_to_device, counts.copies_to_host) == (0, 1)
    assert counts.num_launches <= 12


def test_arrays_of_all_sizes_go_to_a_device_as_one(device, monkeypatch):
    arrays = [np.arange(3), np.empty(0, np.float32), np.array([True]), np.arange(10, dtype=np.uint8).reshape(2, 5)]
    there = upload(arrays, torch.device(device))
    for array, tensor in zip(arrays, there, strict=True):
        assert tensor.device.type == device
        assert np.array_equal(tensor.cpu().numpy(), array)
        assert tensor.cpu().numpy().dtype == array.dtype
    with fake_gpu(monkeypatch) as counts:
        shapes = [tuple(tensor.shape) for tensor in upload(arrays, DEVICE)]
    assert shapes == [array.shape for array in arrays]
    assert (counts.copies_to_device, counts.num_waits) == (1, 0)
