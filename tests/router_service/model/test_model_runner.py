"""How a batch is cut into microbatches, and whose rows are not finite."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from router_service.model.model_runner import _not_finite, split
from router_service.scheduling.scheduler import ScheduledSequence
from tests.router_service.requests import make_sequence


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 3))
def test_every_sequence_is_in_one_part_in_order(sizes, num_parts):
    batch = [ScheduledSequence(make_sequence([1]), 0, size) for size in sizes]
    parts = split(batch, num_parts)
    assert [one for part in parts for one in part] == batch
    assert 1 <= len(parts) <= num_parts
    assert all(parts)
    for part in parts:
        assert sum(one.num_tokens for one in part[:-1]) * num_parts < sum(sizes) + num_parts


def test_large_sums_in_fp16_are_finite():
    """One past 65,504 is infinite in fp16: large activations ended their requests as if an expert had failed."""
    batch = [ScheduledSequence(make_sequence([1]), 0, size) for size in (2, 1, 3)]
    x = torch.full((6, 4096), 20.0, dtype=torch.float16)
    assert _not_finite(x, batch)() == []
    x[2, 7], x[5, 0] = float("inf"), float("nan")
    assert _not_finite(x, batch)() == [batch[1].sequence, batch[2].sequence]
