"""Keys and values in 8 bits: both backends keep the same codes, and what multiplies them changes no bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from experts_service.kernels.compiled.jit import AVAILABLE
from router_service.attention.reference import ReferenceAttention
from tests.router_service.attention.pages import CPU, Pages, Tokens, sized

LENGTH, BLOCK_SIZE = 100, 16

# What the kernels make of one sequence that comes in two chunks and one by one.
ATTEND = """
import torch
from experts_service.kernels.compiled import quantized_tile
from router_service.attention.paged import PagedAttention
from tests.router_service.attention.pages import Pages, Tokens, sized
print(quantized_tile.DIGITS)
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    architecture = sized(num_heads=8, num_kv_heads=2, head_dim=48)
    tokens = Tokens.random(architecture, 150, dtype)
    pages = Pages(PagedAttention(architecture, block_size=16, of_codes=True), 16, 10, dtype, torch.arange(1, 11))
    number = pages.new_sequence()
    for start, end in ((0, 70), (70, 149), (149, 150)):
        print(pages.step([(number, tokens, start, end)])[0].float().view(torch.int32).tolist())
"""


def reference(dtype: torch.dtype, window: int | None = None, head_dim: int = 32) -> ReferenceAttention:
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=head_dim, sliding_window=window)
    return ReferenceAttention(architecture, block_size=BLOCK_SIZE, dtype=dtype, device=CPU, of_codes=True)


def in_steps(pages: Pages, tokens: Tokens, *ends: int) -> torch.Tensor:
    """What a sequence that is alone gets that comes in chunks with these ends."""
    number = pages.new_sequence()
    starts = (0, *ends)
    return torch.cat([pages.step([(number, tokens, a, b)])[0] for a, b in zip(starts, ends, strict=False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 21])
def test_the_reference_attends_to_what_codes_stand_for(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(0)
    backend = reference(dtype, window)
    tokens = Tokens.random(sized(num_heads=4, num_kv_heads=2, head_dim=32), LENGTH, dtype)
    pages = Pages(backend, BLOCK_SIZE, 7, dtype, torch.randperm(7) + 1)
    got = in_steps(pages, tokens, 60, 61, 62, LENGTH).double()
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, tokens.rounded().expected(window), atol=near, rtol=near)


@pytest.mark.skipif(not AVAILABLE, reason="needs numba")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_reference_keep_the_same_codes(dtype: torch.dtype) -> None:
    """Whatever the numbers are: all zero, tiny, huge, not finite."""
    from router_service.attention.paged import PagedAttention

    torch.manual_seed(1)
    architecture = sized(num_heads=4, num_kv_heads=2, head_dim=32)
    tokens = Tokens.random(architecture, BLOCK_SIZE, dtype)
    for x in (tokens.keys, tokens.values):
        x[1], x[2] = 0, 1e-35
        x[3, :, 5], x[4, 1, 2], x[5, 0, 7] = 3e38, float("nan"), float("inf")
        x[6] *= 1e-20
    kept = []
    for backend in (
        reference(dtype),
        PagedAttention(architecture, block_size=BLOCK_SIZE, of_codes=True),
    ):
        pages = Pages(backend, BLOCK_SIZE, 1, dtype, torch.tensor([1]))
        pages.step([(pages.new_sequence(), tokens, 0, BLOCK_SIZE)])
        kept.append((pages.cache.keys[1, 1], pages.cache.values[1, 1]))
    (keys, values), (packed_keys, packed_values) = kept

    def check(of_reference: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        assert torch.equal(of_reference[..., :32].int(), codes.reshape(BLOCK_SIZE, 2, 32).int() - 128)
        expected = of_reference[..., 32:].contiguous().view(torch.float32)[..., 0]
        torch.testing.assert_close(expected, scales, rtol=0, atol=0, equal_nan=True)

    codes, scales = packed_keys.view(2, -1).split([32 * BLOCK_SIZE, 4 * BLOCK_SIZE], dim=1)
    of_keys = scales.contiguous().view(torch.float32).T
    check(keys, codes.view(2, 8, BLOCK_SIZE, 4).permute(2, 0, 1, 3), of_keys)
    codes, scales = packed_values.view(2, -1).split([32 * BLOCK_SIZE, 4 * BLOCK_SIZE], dim=1)
    check(values, codes.view(2, 4, 32, 4).permute(1, 3, 0, 2), scales.contiguous().view(torch.float32).T)
    assert torch.isnan(of_keys[4, 1])
    assert torch.isnan(of_keys[5, 0])
    assert torch.isfinite(of_keys[[0, 1, 2, 3, 6]]).all()


@pytest.mark.long
@pytest.mark.skipif(not AVAILABLE, reason="needs numba")
@pytest.mark.parametrize(("cpu", "features"), [("haswell", "+avx2,+fma,+avx,+sse2"), ("nehalem", "+sse4.2,+sse2")])
def test_a_token_gets_the_same_bits_on_a_cpu_that_multiplies_in_another_way(cpu: str, features: str) -> None:
    """Coordinators of one model may be on machines of different age."""

    def run(**variables: str) -> list[str]:
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", ATTEND], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    here, older = run(), run(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    assert older[0] == "False"
    assert older[1:] == here[1:]
