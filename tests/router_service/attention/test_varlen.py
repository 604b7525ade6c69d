"""What `varlen_attn` is called with on a GPU: on tensors without memory, and against what its documentation says."""

from __future__ import annotations

from array import array

import pytest
import torch

from router_service.attention import varlen
from router_service.attention.choice import attention_backend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.varlen import PAGE, VarlenAttention
from tests.router_service.attention.pages import Pages, Tokens, sized

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("window", [None, 100])
def test_torch_takes_what_it_is_given(window):
    """Shapes and dtypes, by torch's own rules for tensors that have nothing else."""
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64, sliding_window=window)
    backend = VarlenAttention(architecture, device=META)
    cache = KVCache(2, 9, backend.layout, dtype=torch.bfloat16, device=META)
    spans = [Span(299, 1, array("i", [3, 4])), Span(0, 40, array("i", [5]))]
    heads = torch.empty(41, 8 + 2 + 2, 64, dtype=torch.bfloat16, device=META)
    plan = backend.plan(AttentionMetadata(spans, PAGE))
    attended = plan.attend(1, *heads.split([8, 2, 2], dim=1), cache)
    assert (attended.shape, attended.dtype, attended.device) == ((41, 8, 64), torch.bfloat16, META)
    for numbers, shape in ((plan._query_starts, 3), (plan._context_lengths, 2)):
        assert (numbers.shape, numbers.dtype) == ((shape,), torch.int32)
    assert (plan._block_tables.shape, plan._block_tables.dtype) == ((2, 2), torch.int32)
    assert (plan._most_queries, plan._longest) == (40, 300)


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **named):
    """`varlen_attn` with a block table, by its documentation: queries are the last of the keys that are used."""
    assert cu_seq_k is None
    assert named.pop("num_splits") == 1
    assert named.pop("enable_gqa") == (key.shape[2] != query.shape[1])
    (left, right), used, tables = named.pop("window_size"), named.pop("seqused_k"), named.pop("block_table")
    assert right == 0
    assert not named
    outputs = []
    for sequence, length in enumerate(used.tolist()):
        queries = query[cu_seq_q[sequence] : cu_seq_q[sequence + 1]]
        assert len(queries) <= max_q
        assert length <= max_k
        times = query.shape[1] // key.shape[2]
        keys, values = (
            x[tables[sequence].long()].flatten(0, 1)[:length].repeat_interleave(times, dim=1) for x in (key, value)
        )
        positions = torch.arange(length - len(queries), length)[:, None]
        seen = torch.arange(length)[None] <= positions
        if left >= 0:
            seen &= torch.arange(length)[None] >= positions - left
        scores = torch.einsum("qnh,knh->nqk", queries.float(), keys.float()) / query.shape[2] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nqk,knh->qnh", weights, values.float()).to(query.dtype))
    return torch.cat(outputs)


def check(device: torch.device, dtype: torch.dtype, window: int | None) -> None:
    """Two sequences in steps that mix a prompt's chunks with decoding."""
    torch.manual_seed(0)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64, sliding_window=window)
    pages = Pages(VarlenAttention(architecture, device=device), PAGE, 6, dtype, torch.randperm(6) + 1, device=device)
    one, other = (Tokens.random(architecture, length, dtype, device=device) for length in (600, 300))
    first, second = pages.new_sequence(), pages.new_sequence()
    got = [
        pages.step([(first, one, 0, 270)]),
        pages.step([(first, one, 270, 599), (second, other, 0, 299)]),
        pages.step([(first, one, 599, 600), (second, other, 299, 300)]),
    ]
    whole = torch.cat([got[0][0], got[1][0], got[2][0]]), torch.cat([got[1][1], got[2][1]])
    for attended, tokens in zip(whole, (one, other), strict=True):
        torch.testing.assert_close(attended.double(), tokens.expected(window), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 1, 100])
def test_what_it_asks_for_is_attention(monkeypatch, window):
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    check(CPU, torch.bfloat16, window)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
def test_and_a_gpu_computes_it(window):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(torch.device("cuda"), torch.bfloat16, window)


@pytest.mark.parametrize(
    ("capability", "dtype", "block_size", "expected"),
    [
        ((9, 0), torch.bfloat16, PAGE, "VarlenAttention"),
        ((7, 5), torch.bfloat16, PAGE, "ReferenceAttention"),
        ((9, 0), torch.float32, PAGE, "ReferenceAttention"),
        ((9, 0), torch.bfloat16, 16, "ReferenceAttention"),
    ],
)
def test_it_is_chosen_where_its_kernel_runs(monkeypatch, capability, dtype, block_size, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=128)
    device = torch.device("cuda")
    backend = attention_backend(architecture, block_size=block_size, dtype=dtype, device=device)
    assert type(backend).__name__ == expected
