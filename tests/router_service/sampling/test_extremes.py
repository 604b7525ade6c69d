"""The ends of what clients may ask of the sampler: refused by name at the door, or drawn as it is defined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.messages import SamplingParams
from experts_service.kernels.compiled import jit
from gateway.request.protocol import CompletionRequest, parse_body
from gateway.request.sampling_options import sampling_options
from router_service.sampling.sampler import Sampler
from router_service.scheduling.sequence import Sequence
from tests.gateway.doubles import model_card
from tests.router_service.requests import make_request
from tests.router_service.sampling.reference_sampler import adjusted

EOS = frozenset({2})
CARD = model_card(Path(), vocab_size=50)
TINY = [5e-324, 1e-300, 1e-46, 1e-40, 1e-38, 1e-30, 1e-20, 1e-7, 1e-5, 1e-4]
NEARLY_ONE = [1 - 2**-53, 1 - 1e-9]
FIELDS: dict[str, list[Any]] = {
    "temperature": [-0.0, *TINY, 1.0, 2.0],
    "top_p": [-0.0, *TINY, *NEARLY_ONE],
    "min_p": [-0.0, *TINY, *NEARLY_ONE, 1.0],
    "top_k": [-1, 1, 50, 51, 2**31 - 1],
    "repetition_penalty": [-0.0, *TINY, 0.01, *NEARLY_ONE, 10.0],
    "presence_penalty": [-2.0, 2.0, *TINY],
    "frequency_penalty": [-2.0, 2.0, *TINY],
    "logit_bias": [{"0": -100, "5": 100}, {str(i): -100 for i in range(50)}, {"7": 1e-46}],
    "min_tokens": [9],
}
needs_numba = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")
ASKED = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in FIELDS.items()})


def at_the_door(asked: dict[str, Any]) -> SamplingParams | InvalidRequest:
    try:
        body = parse_body(CompletionRequest, {"prompt": "x", **asked}, 0)
        return SamplingParams(max_tokens=16, **sampling_options(body, CARD, max_choices=1))
    except InvalidRequest as error:
        return error


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_numba), False])
@example({"repetition_penalty": 1e-38}, 100.0, 0)
@example({"repetition_penalty": 1e-46, "temperature": 1.0}, 1.0, 1)
@given(ASKED, st.sampled_from([0.0, 1.0, 100.0, 1e4]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_what_the_door_lets_through_is_drawn_as_it_is_defined(
    is_compiled: bool, asked: dict[str, Any], scale: float, seed: int
) -> None:
    """A repetition penalty of 1e-38 made the logits of seen tokens infinite, their shares NaN: token 0 was drawn."""
    sampling = at_the_door(asked)
    if isinstance(sampling, InvalidRequest):
        assert sampling.param in asked
        assert sampling.message.startswith(f"{sampling.param}: must be between ")
        return
    request = make_request([5, 6, 7, 7], output=[8, 8, 9], seed=seed)
    sequence = Sequence(replace(request, sampling=sampling))
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)) * scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "AVAILABLE", is_compiled)
        [token_id], _ = Sampler(EOS)(logits, [sequence])
    wished = adjusted(logits[0].double(), sequence, EOS)
    if sampling.temperature < 1e-5:
        assert wished[token_id] >= wished.max() - 1e-6 * wished.abs().max()
    else:
        shares = (wished / sampling.temperature).softmax(-1)
        assert shares[token_id] > 1e-9, (token_id, shares)
