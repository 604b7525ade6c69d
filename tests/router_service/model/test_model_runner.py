"""How a batch is cut into microbatches."""

from hypothesis import given
from hypothesis import strategies as st

from router_service.model.model_runner import split
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
