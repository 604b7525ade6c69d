# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-redef,no-untyped-call"
"""What is done to each row between two matmuls of a layer, as Triton's kernels. Imported where they are started.

Each rounds where the same lines of torch do. A row's sums are in an order of their own that no other row has a part in.
Widths are the model's, so each model has one kernel of a kind; how many rows there are is no part of it.

Shapes: T tokens, D hidden size, N heads, H head_dim, K experts per token, E experts. A pair is choice · T + row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm(x, delta, weight, rows, epsilon, width: tl.constexpr, block: tl.constexpr) -> None:
    """`x` [T, D] += `delta`, if any; `rows` [T, D] = x / rms(x), rounded, · `weight` [D]. A program does a row."""
    at = tl.arange(0, block)
    inside = at < width
    of_row = tl.program_id(0).to(tl.int64) * width + at
    value = tl.load(x + of_row, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + of_row, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x + of_row, value.to(x.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    scaled = (value * scale).to(x.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + of_row, scaled.to(x.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x,  # [T, N, H], rows that are `stride` apart; changed
    cosines,  # [T, H], both halves the same
    sines,
    stride,
    num_heads: tl.constexpr,
    half: tl.constexpr,  # H / 2
    heads_at_once: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program does some heads of a row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_at_once + tl.arange(0, heads_at_once)
    h = tl.arange(0, block)
    inside = (head < num_heads)[:, None] & (h < half)[None, :]
    at = x + row * stride + head[:, None] * (2 * half) + h[None, :]
    cosine = tl.load(cosines + row * (2 * half) + h, mask=h < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sines + row * (2 * half) + h, mask=h < half, other=0.0).to(tl.float32)[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    number: tl.constexpr = x.dtype.element_ty
    turned = (first * cosine).to(number).to(tl.float32) - (second * sine).to(number).to(tl.float32)
    tl.store(at, turned.to(number), mask=inside)
    turned = (second * cosine).to(number).to(tl.float32) + (first * sine).to(number).to(tl.float32)
    tl.store(at + half, turned.to(number), mask=inside)


@triton.jit
def choose(
    scores,  # [T, E]
    weights,  # [T, K]
    experts,  # [T, K]
    renormalised: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    block: tl.constexpr,
    chosen_block: tl.constexpr,
) -> None:
    """Softmax of a row of `scores`; the K highest → `experts` and `weights`, which add up to one if `renormalised`.

    Of equal ones the first. A row that is not finite goes to experts that there are, with weights that are not numbers.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, block)
    inside = expert < num_experts
    score = tl.load(scores + row * num_experts + expert, mask=inside, other=-float("inf")).to(tl.float32)
    probability = tl.exp(score - tl.max(score, 0))
    probability = probability / tl.sum(probability, 0)
    left = tl.where(inside, tl.where(probability == probability, probability, 0.0), -1.0)
    k = tl.arange(0, chosen_block)
    chosen, indices = tl.zeros((chosen_block,), tl.float32), tl.zeros((chosen_block,), tl.int32)
    whole = 0.0
    for choice in tl.static_range(top_k):
        best = tl.argmax(left, 0)
        of_best = tl.sum(tl.where(expert == best, probability, 0.0), 0)
        whole += of_best
        chosen = tl.where(k == choice, of_best, chosen)
        indices = tl.where(k == choice, best, indices)
        left = tl.where(expert == best, -1.0, left)
    if renormalised:
        chosen = chosen / whole
    tl.store(weights + row * top_k + k, chosen, mask=k < top_k)
    tl.store(experts + row * top_k + k, indices.to(tl.int64), mask=k < top_k)


@triton.jit(do_not_specialize=["num_rows"])
def route(
    experts,  # [T, K]
    ranks,  # [E]
    row_indices,  # [K * T]
    places,  # [K * T]
    ends,  # [E]
    ends_so_far,  # [E], added to
    num_real,  # [1]; None: all rows are
    num_rows,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program finds the pairs of one expert: those before it are counted, then its own are told their places.

    One program more, if `num_real` is given, has those of the rows behind it, which are nobody's.
    """
    mine = tl.program_id(0)
    num_pairs = num_rows * top_k
    real = num_rows
    if num_real is not None:
        real = tl.load(num_real).to(tl.int32)
    place = 0
    for first in range(0, num_pairs, block):
        pair = first + tl.arange(0, block)
        expert = tl.load(experts + pair, mask=pair < num_pairs, other=0)  # in any order
        rank = tl.where(pair // top_k < real, tl.load(ranks + expert), num_experts)
        place += tl.sum(((rank < mine) & (pair < num_pairs)).to(tl.int32), 0)
    for first in range(0, num_pairs, block):
        pair = first + tl.arange(0, block)
        row = pair % num_rows
        expert = tl.load(experts + row * top_k + pair // num_rows, mask=pair < num_pairs, other=0)
        rank = tl.where(row < real, tl.load(ranks + expert), num_experts)
        is_mine = (rank == mine) & (pair < num_pairs)
        found = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(places + pair, (place + found - 1).to(tl.int64), mask=is_mine)
        tl.store(row_indices + place + found - 1, row.to(tl.int64), mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32), 0)
    if mine < num_experts:
        tl.store(ends + mine, place)
        tl.store(ends_so_far + mine, tl.load(ends_so_far + mine) + place)


@triton.jit(do_not_specialize=["num_rows"])
def combine(
    answers,  # [K * T, D]
    weights,  # [T, K]
    experts,  # [T, K]
    places,  # [K * T]
    totals,  # [T, D]
    num_rows,
    num_experts: tl.constexpr,
    width: tl.constexpr,
    top_k: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Add a row's answers by ascending expert, each term and each sum rounded. A program does a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    number: tl.constexpr = answers.dtype.element_ty
    total = tl.zeros((block,), tl.float32)
    last = tl.full((), -1, tl.int64)
    for k in tl.static_range(top_k):
        expert, choice = tl.full((), num_experts, tl.int64), tl.full((), 0, tl.int64)
        for other in tl.static_range(top_k):
            candidate = tl.load(experts + row * top_k + other)
            is_next = (candidate > last) & (candidate < expert)
            choice = tl.where(is_next, other, choice)
            expert = tl.where(is_next, candidate, expert)
        last = expert
        place = tl.load(places + choice * num_rows + row)
        term = tl.load(answers + place * width + at, mask=at < width, other=0.0).to(tl.float32)
        term = (term * tl.load(weights + row * top_k + choice)).to(number).to(tl.float32)
        total = term if k == 0 else (total + term).to(number).to(tl.float32)
    tl.store(totals + row * width + at, total.to(number), mask=at < width)
