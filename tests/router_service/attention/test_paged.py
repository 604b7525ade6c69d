"""The CPU kernels compute attention, and neither how work is cut nor a neighbour changes a token's bits.

Whatever is not written, and whatever belongs to others, is NaN in all of these tests.
"""

from __future__ import annotations

import itertools
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts_service.kernels.compiled import tile
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.routine import num_threads
from router_service.attention.choice import attention_backend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.reference import ReferenceAttention
from tests.memory import peak_bytes
from tests.router_service.attention.pages import Pages, Tokens, sized

if not AVAILABLE:
    pytest.skip("needs numba", allow_module_level=True)

from router_service.attention.paged import PagedAttention
from router_service.attention.paged_kernels import SPLIT, TILE

CPU = torch.device("cpu")
CODES = -1  # instead of an arithmetic: keys and values are kept in 8 bits
WAYS = {
    "fp32": (torch.float32, tile.FMA),
    "bf16": (torch.bfloat16, tile.FMA),
    **({"bf16-dot": (torch.bfloat16, tile.DOT)} if tile.HAS_DOT else {}),
    "fp32-int8": (torch.float32, CODES),
    "bf16-int8": (torch.bfloat16, CODES),
}  # dtypes, and how they are multiplied
in_every_way = pytest.mark.parametrize(("dtype", "arithmetic"), WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def restore_threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def paged(architecture, block_size, threads=1, arithmetic=tile.FMA):
    torch.set_num_threads(threads)
    if arithmetic == CODES:
        return PagedAttention(architecture, block_size=block_size, of_codes=True)
    return PagedAttention(architecture, block_size=block_size, arithmetic=arithmetic)


def expected(tokens, window, arithmetic, first=0):
    """In float64. Of codes: what they stand for."""
    return (tokens.rounded() if arithmetic == CODES else tokens).expected(window, first)


def close(dtype, arithmetic):
    """How near it has to be. With codes queries and weights are integers of 16 bits, the largest of them 32,512."""
    if dtype == torch.bfloat16:
        return 1e-2
    return 5e-4 if arithmetic == CODES else 2e-6


def in_chunks(backend, block_size, tokens, chunks, order=None):
    """What each position of a sequence gets that is alone and comes in these chunks."""
    length = len(tokens.queries)
    num_blocks = -(-length // block_size)
    pages = Pages(backend, block_size, num_blocks, tokens.queries.dtype, order or torch.arange(1, num_blocks + 1))
    number = pages.new_sequence()
    bounds = [0, *itertools.accumulate(chunks)]
    return torch.cat([pages.step([(number, tokens, a, b)])[0] for a, b in itertools.pairwise(bounds)])


@settings(max_examples=36, deadline=None)
@given(
    way=st.sampled_from([*WAYS.values()]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (8, 2), (6, 1), (10, 2), (9, 1)]),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    block_size=st.sampled_from([16, 48, 64, 256]),
    window=st.sampled_from([None, 1, 5, 64, 100]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    threads=st.sampled_from([1, 3]),
    data=st.data(),
)
def test_it_is_attention(way, heads, head_dim, block_size, window, lengths, threads, data):
    """Sequences come in steps of any size, prompts beside those that decode, in blocks that lie anywhere."""
    torch.manual_seed(0)
    dtype, arithmetic = way
    architecture = sized(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, sliding_window=window)
    num_blocks = sum(-(-length // block_size) for length in lengths)
    pages = Pages(
        paged(architecture, block_size, threads, arithmetic),
        block_size,
        num_blocks,
        dtype,
        torch.randperm(num_blocks) + 1,
    )
    sequences = [(pages.new_sequence(), Tokens.random(architecture, length, dtype)) for length in lengths]
    done = [0] * len(sequences)
    got = [[] for _ in sequences]
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        parts = []
        for number, tokens in sequences:
            left = lengths[number] - done[number]
            step = min(left, data.draw(st.sampled_from([0, 1, 1, 7, 64, 200])))
            if step or (not parts and left and number == len(sequences) - 1):
                parts.append((number, tokens, done[number], done[number] + max(step, 1)))
        for (number, _, _, end), attended in zip(parts, pages.step(parts) if parts else [], strict=True):
            got[number].append(attended)
            done[number] = end
            if window:
                pages.release(number, end - window + 1)
    for (number, tokens), pieces in zip(sequences, got, strict=True):
        assert number < len(sequences)
        near = close(dtype, arithmetic)
        torch.testing.assert_close(
            torch.cat(pieces).double(), expected(tokens, window, arithmetic), atol=near, rtol=near
        )


@in_every_way
@pytest.mark.parametrize(("length", "threads"), [(40, 1), (SPLIT + 130, 1), (SPLIT + 130, 3)])
def test_sinks_take_their_share_and_have_no_value(dtype, arithmetic, length, threads):
    """As gpt-oss's: small ones, and one that leaves next to nothing for others. In one unit of work, and in several."""
    torch.manual_seed(3)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=32)
    tokens = Tokens.random(architecture, length, dtype)
    sinks = torch.tensor([-3.0, 0, 1, 2, 3, 5, 8, 200]).to(dtype)
    num_blocks = -(-length // 16)
    backend = paged(architecture, 16, threads, arithmetic)
    pages = Pages(backend, 16, num_blocks, dtype, torch.arange(1, num_blocks + 1), sinks=sinks)
    number = pages.new_sequence()
    got = torch.cat([pages.step([(number, tokens, a, b)])[0] for a, b in ((0, length - 1), (length - 1, length))])
    rounded = tokens.rounded() if arithmetic == CODES else tokens
    near = close(dtype, arithmetic)
    torch.testing.assert_close(got.double(), rounded.expected(None, sinks=sinks), atol=near, rtol=near)


@in_every_way
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("num_heads", "groups"), [(8, 2), (3, 3)])
def test_a_token_gets_the_same_bits_in_whatever_chunk_it_came(dtype, arithmetic, window, num_heads, groups):
    torch.manual_seed(1)
    architecture = sized(num_heads=num_heads, num_kv_heads=groups, head_dim=32, sliding_window=window)
    length = SPLIT + 130
    tokens = Tokens.random(architecture, length, dtype)
    whole = in_chunks(paged(architecture, 16, arithmetic=arithmetic), 16, tokens, [length])
    assert torch.isfinite(whole).all()
    for sizes in ([64], [17, 1, 300, 5], [TILE * 3 + 1]):
        ends = itertools.takewhile(lambda end: end < length, itertools.accumulate(itertools.cycle(sizes)))
        chunks = [b - a for a, b in itertools.pairwise([0, *ends, length])]
        assert torch.equal(in_chunks(paged(architecture, 16, arithmetic=arithmetic), 16, tokens, chunks), whole)


@in_every_way
@pytest.mark.parametrize("length", [1, 16, 17, TILE, TILE + 1, SPLIT, SPLIT + 1])
def test_and_the_same_as_the_last_of_a_prompt_or_decoded(dtype, arithmetic, length):
    torch.manual_seed(2)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64)
    tokens = Tokens.random(architecture, length, dtype)
    whole = in_chunks(paged(architecture, 64, arithmetic=arithmetic), 64, tokens, [length])
    if length > 1:
        decoded = in_chunks(paged(architecture, 64, threads=4, arithmetic=arithmetic), 64, tokens, [length - 1, 1])
        assert torch.equal(decoded[-1], whole[-1])
    near = close(dtype, arithmetic)
    torch.testing.assert_close(whole.double(), expected(tokens, None, arithmetic), atol=near, rtol=near)


@in_every_way
def test_neighbours_threads_and_block_sizes_change_no_bit(dtype, arithmetic):
    """A long context is cut into splits for many threads, and added up afterwards."""
    torch.manual_seed(3)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64)
    lengths = [2 * SPLIT + 77, 1, 300, SPLIT, 64]
    sequences = [Tokens.random(architecture, length, dtype) for length in lengths]
    alone = [
        in_chunks(paged(architecture, 16, arithmetic=arithmetic), 16, tokens, [length - 1, 1] if length > 1 else [1])
        for length, tokens in zip(lengths, sequences, strict=True)
    ]
    torch.set_num_threads(2)
    assert num_threads(sum(lengths) * 2 * 2 * 64 * dtype.itemsize, 0) == 2, "several threads share a step"
    for block_size, threads in ((16, 1), (64, 2), (16, 16)):
        num_blocks = sum(-(-length // block_size) for length in lengths)
        backend = paged(architecture, block_size, threads, arithmetic)
        pages = Pages(backend, block_size, num_blocks, dtype, torch.randperm(num_blocks) + 1)
        numbers = [pages.new_sequence() for _ in sequences]
        for number, tokens in zip(numbers, sequences, strict=True):
            if lengths[number] > 1:
                pages.step([(number, tokens, 0, lengths[number] - 1)])
        together = pages.step([(n, t, lengths[n] - 1, lengths[n]) for n, t in zip(numbers, sequences, strict=True)])
        for one, got in zip(alone, together, strict=True):
            assert torch.equal(got[0], one[-1])


@pytest.mark.parametrize("length", [1, 256])
def test_a_step_takes_no_memory_for_its_context(length):
    """Copies of the keys and values of 16,384 tokens were 64 MiB in a layer of Mixtral, and masks 4 to 12 more."""
    architecture = sized(num_heads=32, num_kv_heads=8, head_dim=128)
    backend, context = paged(architecture, 64, threads=2), 16384
    cache = KVCache(1, context // 64, backend.layout, dtype=torch.bfloat16, device=CPU)
    for memory in (cache.keys, cache.values):
        memory.fill_(0.5)
    new = torch.randn(length, 32 + 8 + 8, 128).bfloat16().split([32, 8, 8], dim=1)

    def run(start=context - length):
        span = Span(start, length, array("i", range(1, 1 + context // 64)))
        backend.plan(AttentionMetadata([span], 64)).attend(0, *new, cache)

    run(start=0)  # what is allocated once
    assert peak_bytes(run) < 16 * 2**20


@in_every_way
def test_nan_of_its_own_reaches_a_token(dtype, arithmetic):
    """What is not finite is found by looking at what comes out, so it may not vanish on the way.

    Nor may it reach those before: two keys that stand together are multiplied at once.
    """
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=16)
    for name, position in itertools.product(("keys", "values"), (6, 7)):
        tokens = Tokens.random(architecture, 40, dtype)
        getattr(tokens, name)[position] = float("nan")
        got = in_chunks(paged(architecture, 16, arithmetic=arithmetic), 16, tokens, [40])
        assert torch.isfinite(got[:position]).all()
        assert torch.isnan(got[position:]).all()


@in_every_way
@pytest.mark.parametrize("window", [None, 1500])
def test_long_contexts_are_as_close_as_rounding_lets_them(dtype, arithmetic, window):
    """3,000 keys, some of them far more alike to the query than others. The error is of all numbers together."""
    torch.manual_seed(4)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64, sliding_window=window)
    tokens = Tokens.random(architecture, 3001, dtype)
    tokens.queries *= 3
    exact = expected(tokens, window, arithmetic, first=3000)
    got = in_chunks(paged(architecture, 16, arithmetic=arithmetic), 16, tokens, [3000, 1])[-1:].double()
    nearest = (exact.to(dtype).double() - exact).norm()
    error = (got - exact).norm()
    assert error < (2 * nearest if dtype == torch.bfloat16 else close(dtype, arithmetic) * exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_in_8_bits_is_nan(dtype):
    """No scale makes it a code, and the sequence is to be found and ended, as it is without codes."""
    position, architecture = 7, sized(num_heads=4, num_kv_heads=2, head_dim=16)
    for name in ("keys", "values"):
        tokens = Tokens.random(architecture, 40, dtype)
        getattr(tokens, name)[position, :, 3] = float("-inf")
        got = in_chunks(paged(architecture, 16, arithmetic=CODES), 16, tokens, [40])
        assert torch.isfinite(got[:position]).all()
        assert torch.isnan(got[position:]).all()


def test_what_the_kernels_cannot_do_the_reference_does():
    def chosen(dtype=torch.float32, block_size=16, head_dim=64, device="cpu", of_codes=False):
        architecture = sized(num_heads=4, num_kv_heads=2, head_dim=head_dim)
        device = torch.device(device)
        return type(
            attention_backend(architecture, block_size=block_size, dtype=dtype, device=device, of_codes=of_codes)
        )

    assert chosen() is chosen(torch.bfloat16) is PagedAttention
    assert chosen(head_dim=512) is chosen(of_codes=True) is PagedAttention
    assert chosen(head_dim=512, of_codes=True) is chosen(block_size=1, of_codes=True) is ReferenceAttention
    assert chosen(torch.float16) is chosen(block_size=1) is chosen(head_dim=8) is ReferenceAttention
