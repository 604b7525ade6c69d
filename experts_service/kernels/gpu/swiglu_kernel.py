# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-redef,no-untyped-call"
"""Triton's kernel of what is between the products of a feed-forward network. Imported where it is started."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_product(gate_up, hidden, width: tl.constexpr, block: tl.constexpr) -> None:
    """`hidden` [R, F] = silu(gate) · up of `gate_up` [R, 2 F], each rounded. A program does a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    gate = tl.load(gate_up + row * (2 * width) + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * width) + width + at, mask=inside, other=0.0).to(tl.float32)
    number: tl.constexpr = hidden.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(number).to(tl.float32)
    tl.store(hidden + row * width + at, (silu * up).to(number), mask=inside)
