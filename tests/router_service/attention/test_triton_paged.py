"""The GPU's kernels compute attention, and neither how work is cut nor a neighbour changes a token's bits.

Without a GPU Triton interprets them. Whatever is not written, and whatever belongs to others, is NaN in all of these
tests. Tiles and splits are shorter than served ones: the interpreter is slow.
"""

from __future__ import annotations

import itertools
import json
import os
from array import array

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from experts_service.kernels.gpu.launch import can_compile
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.attention.reference import ReferenceAttention
from tests.programs import said_by
from tests.router_service.attention.pages import LAYER, Pages, Tokens, sized

if not can_compile():
    pytest.skip("needs Triton and a C compiler", allow_module_level=True)

import tests.triton_interpreter  # noqa: F401
from router_service.attention import choice, triton_paged
from router_service.attention.triton_paged import TritonAttention

SPLIT, TILE = 32, 16
# How near it has to be: weights are rounded to the dtype before they are multiplied with values, and so is the result.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def short_splits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_paged, "SPLIT", SPLIT)
        yield


@pytest.fixture(scope="module", autouse=True)
def interpreted(device):
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels are compiled here, and run on the GPU only")


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are started, and in how many programs."""
    started = []
    launch = triton_paged.launch

    def counted(kernel, grid, *arguments, **constants):
        started.append((kernel.__name__, grid))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(triton_paged, "launch", counted)
    return started


@pytest.fixture
def copied(monkeypatch):
    """What is copied to the device."""
    copies = []
    upload = triton_paged.upload

    def counted(arrays, device):
        copies.extend(arrays)
        return upload(arrays, device)

    monkeypatch.setattr(triton_paged, "upload", counted)
    return copies


def on(device, architecture, block_size=16, dtype=torch.float32):
    backend = TritonAttention(architecture, block_size=block_size, dtype=dtype, device=torch.device(device))
    backend.tile = TILE
    return backend


def new_pages(backend, lengths, order=None):
    """A cache with room for sequences of these lengths."""
    num_blocks = sum(-(-length // backend.block_size) for length in lengths)
    order = torch.randperm(num_blocks) + 1 if order is None else order
    return Pages(backend, backend.block_size, num_blocks, backend.dtype, order, device=backend.device)


def fill(pages, number, tokens, end):
    """Positions 0 … end - 1 as if they had been computed: programs that write a token each take their time."""
    plans = pages.backend.plan
    pages.backend.plan = lambda metadata: _Filled(pages, metadata)
    pages.step([(number, tokens, 0, end)])
    pages.backend.plan = plans


class _Filled:
    def __init__(self, pages, metadata):
        self.pages, self.slots = pages, torch.from_numpy(metadata.write_slots)

    def attend(self, layer, queries, keys, values, kv_cache):
        size = self.pages.block_size
        for memory, new in ((kv_cache.keys, keys), (kv_cache.values, values)):
            memory[layer, self.slots // size, :, self.slots % size] = new
        return queries


def in_chunks(backend, tokens, *ends):
    """What each position of a sequence gets that is alone and comes in chunks that end there."""
    pages = new_pages(backend, [len(tokens.queries)])
    number = pages.new_sequence()
    return torch.cat([pages.step([(number, tokens, a, b)])[0] for a, b in itertools.pairwise([0, *ends])])


def last(backend, tokens):
    """What the last position gets when it decodes alone."""
    length = len(tokens.queries)
    pages = new_pages(backend, [length])
    number = pages.new_sequence()
    if length > 1:
        fill(pages, number, tokens, length - 1)
    return pages.step([(number, tokens, length - 1, length)])[0]


def rows_of(sequences, spans):
    """Queries, keys and values of new tokens."""
    return [
        torch.cat([getattr(tokens, name)[span.start : span.end] for tokens, span in zip(sequences, spans, strict=True)])
        for name in ("queries", "keys", "values")
    ]


def check(attended, tokens, window):
    near = CLOSE[attended.dtype]
    torch.testing.assert_close(
        attended.double(), tokens.expected(window, len(tokens.queries) - len(attended)), atol=near, rtol=near
    )


AS_DRAWN = (Phase.explicit, Phase.generate)  # smaller ones are looked for in minutes
SHAPES = {
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "heads": st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3), (7, 1)]),
    "head_dim": st.sampled_from([8, 32, 48, 64, 128]),
    "block_size": st.sampled_from([1, 16, 48, 64, 256]),
    "window": st.sampled_from([None, 1, 5, 32, 50]),
    "lengths": st.lists(st.integers(1, 90), min_size=1, max_size=3),
    "data": st.data(),
}


def check_any(device, dtype, heads, head_dim, block_size, window, lengths, data):
    """Sequences whose first tokens are there, and steps with prompts beside those that decode, in blocks anywhere."""
    torch.manual_seed(0)
    architecture = sized(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, sliding_window=window)
    pages = new_pages(on(device, architecture, block_size, dtype), lengths)
    sequences = [Tokens.random(architecture, length, dtype, torch.device(device)) for length in lengths]
    done = []
    for tokens in sequences:
        number = pages.new_sequence()
        there = max(0, len(tokens.queries) - data.draw(st.sampled_from([1, 2, 15])))
        if there:
            fill(pages, number, tokens, there)
        if window:
            pages.release(number, there - window + 1)
        done.append(there)
    got = [[] for _ in sequences]
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        parts = [
            (number, tokens, at, min(length, at + data.draw(st.sampled_from([1, 9]))))
            for number, (tokens, at, length) in enumerate(zip(sequences, done, lengths, strict=True))
            if at < length
        ]
        for (number, _, _, end), attended in zip(parts, pages.step(parts), strict=True):
            got[number].append(attended)
            done[number] = end
            if window:
                pages.release(number, end - window + 1)
    for tokens, pieces in zip(sequences, got, strict=True):
        check(torch.cat(pieces), tokens, window)
    for memory in (pages.cache.keys, pages.cache.values):
        assert not memory[:, 0].any(), "nobody writes the null page"


@settings(max_examples=6, deadline=None, phases=AS_DRAWN)
@given(**SHAPES)
def test_it_is_attention(device, dtype, heads, head_dim, block_size, window, lengths, data):
    check_any(device, dtype, heads, head_dim, block_size, window, lengths, data)


@pytest.mark.long
@settings(max_examples=300, deadline=None, phases=AS_DRAWN)
@given(**{**SHAPES, "head_dim": st.sampled_from([8, 32, 48, 64, 80, 96, 128, 256])})
def test_it_is_attention_in_many_shapes(device, dtype, heads, head_dim, block_size, window, lengths, data):
    check_any(device, dtype, heads, head_dim, block_size, window, lengths, data)


def test_it_is_what_the_reference_computes(device):
    """Prompt and decoding, as served: in bf16 both are rounded, each in its own way."""
    torch.manual_seed(1)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=64)
    tokens = Tokens.random(architecture, 40, torch.bfloat16, torch.device(device))
    reference = ReferenceAttention(architecture, block_size=16, dtype=torch.bfloat16, device=torch.device(device))
    reference.block_size = 16
    got = in_chunks(on(device, architecture, dtype=torch.bfloat16), tokens, 39, 40)
    torch.testing.assert_close(got, in_chunks(reference, tokens, 39, 40), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 20)])
def test_a_token_gets_the_same_bits_in_whatever_chunk_it_came(device, dtype, window):
    """Decoded at last, too: it is the same kernel."""
    torch.manual_seed(2)
    architecture = sized(num_heads=2, num_kv_heads=1, head_dim=32, sliding_window=window)
    tokens = Tokens.random(architecture, SPLIT + 12, dtype, torch.device(device))
    backend = on(device, architecture, dtype=dtype)
    whole = in_chunks(backend, tokens, SPLIT + 12)
    check(whole, tokens, window)
    assert torch.equal(in_chunks(backend, tokens, 17, 18, SPLIT + 3, SPLIT + 11, SPLIT + 12), whole)


@pytest.mark.parametrize("length", [1, 16, 17, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1])
def test_contexts_end_where_splits_do(device, length):
    torch.manual_seed(3)
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    tokens = Tokens.random(architecture, length, torch.float32, torch.device(device))
    check(last(on(device, architecture), tokens), tokens, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)])
def test_neighbours_splits_and_block_sizes_change_no_bit(device, dtype, monkeypatch, launched):
    """Alone a long context is shared by many programs, in a batch on a full card one has it all."""
    torch.manual_seed(4)
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    lengths = [5 * SPLIT + 7, 1, SPLIT + 6, SPLIT]
    sequences = [Tokens.random(architecture, length, dtype, torch.device(device)) for length in lengths]
    alone = [last(on(device, architecture, dtype=dtype), tokens) for tokens in sequences]
    prompt = Tokens.random(architecture, 9, dtype, torch.device(device))
    for block_size, programs, merges in ((16, 512, True), (64, 8, True), (16, 1, False)):
        monkeypatch.setattr(triton_paged, "PROGRAMS", programs)
        backend = on(device, architecture, block_size, dtype)
        pages = new_pages(backend, [*lengths, 9])
        parts = []
        for tokens, length in zip(sequences, lengths, strict=True):
            parts.append((pages.new_sequence(), tokens, length - 1, length))
            if length > 1:
                fill(pages, parts[-1][0], tokens, length - 1)
        parts.insert(1, (pages.new_sequence(), prompt, 0, 9))
        launched.clear()
        together = pages.step(parts)
        assert ("merge" in dict(launched)) is merges
        del together[1]
        assert all(map(torch.equal, together, alone))


def test_where_no_room_is_left_for_splits_one_program_has_them(device, monkeypatch, launched):
    torch.manual_seed(5)
    architecture = sized(num_heads=4, num_kv_heads=1, head_dim=32)
    tokens = Tokens.random(architecture, 3 * SPLIT, torch.float32, torch.device(device))
    cut = last(on(device, architecture), tokens)
    assert launched[1:] == [("attend", (3, 1)), ("merge", (1, 1))]
    monkeypatch.setattr(triton_paged, "PARTIAL_BYTES", 2 * 4 * 4 * (32 + 2))
    launched.clear()
    assert torch.equal(last(on(device, architecture), tokens), cut)
    assert launched == [("write", (1,)), ("attend", (1, 1))]


def test_a_plan_of_many_steps_starts_the_same_whatever_they_are(device, launched, copied):
    """What a CUDA graph captured is replayed with other numbers in the same memory. Others get zeros."""
    torch.manual_seed(6)
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    backend = on(device, architecture)
    lengths = [3 * SPLIT + 5, SPLIT + 3, 20]
    sequences = [Tokens.random(architecture, length, torch.float32, torch.device(device)) for length in lengths]
    plan = backend.decode_plan(4, 4 * SPLIT)
    assert plan is not None
    memory = plan._numbers.data_ptr()
    pages = new_pages(backend, lengths)
    tables = []
    for tokens, length in zip(sequences, lengths, strict=True):
        number = pages.new_sequence()
        fill(pages, number, tokens, length)
        tables.append(pages._tables[number])
    grids, rows = [], rows_of(sequences[:1], [Span(0, 1, tables[0])])
    for numbers, back in (([0, 1, 2], 2), ([1, 0], 1), ([2], 0), ([], 0)):  # the last as it is captured
        spans = [Span(lengths[n] - 1 - back, 1, tables[n]) for n in numbers]
        copied.clear()
        plan.update(AttentionMetadata(spans, 16))
        assert len(copied) == 1
        rows = rows_of([sequences[n] for n in numbers], spans) if numbers else [x[:0] for x in rows]
        filled = [torch.cat([x, x.new_full((4 - len(x), *x.shape[1:]), 3.0)]) for x in rows]
        launched.clear()
        attended = plan.attend(LAYER, *filled, pages.cache)
        grids.append(list(launched))
        if numbers:
            expected = backend.plan(AttentionMetadata(spans, 16)).attend(LAYER, *rows, pages.cache)
            assert torch.equal(attended[: len(numbers)], expected)
        assert not attended[len(numbers) :].any()
        assert not pages.cache.keys[:, 0].any()
    assert grids[0] == grids[1] == grids[2] == grids[3]
    assert [kernel for kernel, _ in grids[0]] == ["write", "attend", "merge"]
    assert plan._numbers.data_ptr() == memory


def test_a_captured_step_is_replayed_with_other_numbers(device):
    if device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    backend = on(device, architecture)
    tokens = Tokens.random(architecture, 3 * SPLIT, torch.float32, torch.device(device))
    plan, pages = backend.decode_plan(1, 3 * SPLIT), new_pages(backend, [3 * SPLIT])
    number = pages.new_sequence()
    fill(pages, number, tokens, 3 * SPLIT)
    steps = [[Span(position, 1, pages._tables[number])] for position in (3 * SPLIT - 1, 5, SPLIT)]
    rows = rows_of([tokens], steps[0])
    plan.update(AttentionMetadata(steps[0], 16))
    plan.attend(LAYER, *rows, pages.cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended = plan.attend(LAYER, *rows, pages.cache)
    for spans in steps:
        new = rows_of([tokens], spans)
        for x, of_step in zip(rows, new, strict=True):
            x.copy_(of_step)
        plan.update(AttentionMetadata(spans, 16))
        graph.replay()
        assert torch.equal(attended, backend.plan(AttentionMetadata(spans, 16)).attend(LAYER, *new, pages.cache))


def test_a_plan_of_many_steps_has_room_for_the_longest(device):
    """Of any steps of so many sequences: whatever their lengths, units and blocks fit."""
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    backend = on(device, architecture)
    plan = backend.decode_plan(64, 1000 * SPLIT)
    table = array("i", [1]) * (1000 * SPLIT // 16)
    for lengths in ([1000 * SPLIT] * 64, [1000 * SPLIT, *[1] * 63], [1000 * SPLIT // n for n in range(1, 65)], [1]):
        plan.update(AttentionMetadata([Span(length - 1, 1, table) for length in lengths], 16))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_nan_of_its_own_reaches_a_token(device, name):
    """What is not finite is found by looking at what comes out, so it may not vanish on the way."""
    architecture = sized(num_heads=2, num_kv_heads=1, head_dim=32)
    tokens = Tokens.random(architecture, 40, torch.float32, torch.device(device))
    getattr(tokens, name)[36] = float("nan")
    attended = in_chunks(on(device, architecture), tokens, 36, 37, 40)
    assert torch.isfinite(attended[:36]).all()
    assert torch.isnan(attended[36:]).all()


def test_a_step_is_told_of_in_one_copy(device, launched, copied):
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    backend = on(device, architecture)
    tokens = Tokens.random(architecture, 40, torch.float32, torch.device(device))
    pages = new_pages(backend, [40, 40])
    one, other = pages.new_sequence(), pages.new_sequence()
    fill(pages, one, tokens, 19)
    copied.clear()
    pages.step([(one, tokens, 19, 20), (other, tokens, 0, 3)])
    assert len(copied) == 1
    assert copied[0].dtype == np.int32
    assert [kernel for kernel, _ in launched] == ["write", "attend"]


def test_what_is_served_is_compiled_at_the_start(device, launched):
    on(device, sized(num_heads=4, num_kv_heads=2, head_dim=32)).warm_up()
    assert [kernel for kernel, _ in launched] == ["write", "attend", "merge"]


@pytest.mark.parametrize(
    ("capability", "compiles", "head_dim", "why"),
    [
        ((8, 0), True, 128, None),
        ((9, 0), True, 64, None),
        ((7, 5), True, 128, "compute capability 8.0"),
        ((9, 0), False, 128, "install triton (torch for CUDA brings it) and gcc"),
        ((9, 0), True, 512, "at most 256 numbers"),
    ],
)
def test_it_is_chosen_where_it_runs_and_else_the_log_says_why(monkeypatch, caplog, capability, compiles, head_dim, why):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr(choice, "can_compile", lambda: compiles)
    monkeypatch.setattr(TritonAttention, "warm_up", lambda _: None)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=head_dim)
    device = torch.device("cuda")
    backend = choice.attention_backend(architecture, block_size=16, dtype=torch.bfloat16, device=device)
    assert type(backend) is (ReferenceAttention if why else TritonAttention)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (why is not None)
    assert (why or "") in "".join(warnings)


@pytest.mark.parametrize(
    ("dtype", "heads", "served"), [("float32", 32, True), ("float32", 64, False), ("bfloat16", 64, True)]
)
def test_what_does_not_fit_the_memory_of_small_cards_is_not_served(dtype, heads, served):
    """64 heads of 256 numbers in float32 on one key-value head took 100.25 KiB of 99: the first request would fail."""
    architecture = sized(num_heads=heads, num_kv_heads=1, head_dim=256)
    assert triton_paged.is_served(architecture, getattr(torch, dtype)) == served


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"),
    [
        ("bfloat16", 64, 4),
        ("bfloat16", 128, 4),
        ("bfloat16", 256, 4),
        ("bfloat16", 256, 64),
        ("float32", 128, 64),
        ("float32", 256, 32),
    ],
)
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_triton_compiles_it_for_cards_that_nobody_has(capability, dtype, head_dim, heads):
    """Whatever a GPU's compiler refuses, and what would not fit a multiprocessor: 99 KiB on the smallest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = said_by(
        "router_service.compile_attention", capability, dtype, head_dim, heads, environment=environment, timeout_s=900
    )
    shared = json.loads(said)
    assert list(shared) == ["write", "attend", "merge"]
    assert max(shared.values()) <= 99 * 2**10
