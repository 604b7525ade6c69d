"""The reference backend: what it reads at once is bounded, and padding reads the null block."""

from __future__ import annotations

from array import array

import pytest
import torch

from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.reference import ReferenceAttention, runs
from router_service.scheduling.block_manager import NULL_BLOCK
from tests.router_service.attention.pages import sized

CPU = torch.device("cpu")


def test_decodes_that_would_read_too_much_at_once_take_turns():
    assert runs([5, 5, 5, 5], 10) == [slice(0, 2), slice(2, 4)]
    assert runs([1, 1, 9, 1, 1], 10) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert runs([50], 10) == [slice(0, 1)]
    assert runs([], 10) == []
    assert runs([3] * 64, 10**6) == [slice(0, 64)]


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_and_attend_to_the_same(prefill, window):
    torch.manual_seed(0)
    spans = [
        Span(length - 1, 1, array("i", range(1 + 3 * i, 4 + 3 * i))) for i, length in enumerate([3, 17, 1, 40, 22])
    ]
    if prefill:
        spans.insert(2, Span(4, 6, array("i", [16])))
    metadata = AttentionMetadata(spans, block_size=16)
    num_tokens = sum(span.length for span in spans)
    queries, keys, values = (
        torch.randn(num_tokens, 4, 16),
        torch.randn(num_tokens, 2, 16),
        torch.randn(num_tokens, 2, 16),
    )
    memory = torch.randn(2, 2, 17, 16, 2, 16)

    def attended(most):
        backend = ReferenceAttention(
            sized(num_heads=4, num_kv_heads=2, head_dim=16, sliding_window=window),
            block_size=16,
            dtype=torch.float32,
            device=CPU,
            most_gathered=most,
        )
        cache = KVCache(2, 16, backend.layout, dtype=torch.float32, device=CPU)
        cache.keys.copy_(memory[0])
        cache.values.copy_(memory[1])
        return backend.plan(metadata).attend(1, queries, keys, values, cache)

    torch.testing.assert_close(attended(20), attended(10**6), atol=1e-6, rtol=1e-6)


def test_what_pads_decodes_is_in_the_null_block():
    spans = [Span(length - 1, 1, array("i", [i + 1])) for i, length in enumerate((3, 9, 1))]
    backend = ReferenceAttention(
        sized(num_heads=4, num_kv_heads=2, head_dim=16), block_size=16, dtype=torch.float32, device=CPU
    )
    [decodes] = backend.plan(AttentionMetadata(spans, block_size=16))._decodes
    padding = decodes.slots[decodes.mask[:, 0, 0] < 0]
    assert len(padding) == 6 + 8
    assert set((padding // 16).tolist()) == {NULL_BLOCK}
