"""Kernels for GPUs are started by one function, here through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import tests.triton_interpreter  # noqa: F401
from experts_service.kernels.gpu import launch as launching
from experts_service.kernels.gpu.launch import can_compile, compiles_for, launch

SIZE = 32


@triton.jit
def _product(a, b, total, size: tl.constexpr) -> None:  # type: ignore[no-untyped-def]  # Triton's pointers
    row = tl.arange(0, size)
    at = row[:, None] * size + row[None, :]
    tl.store(total + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_multiplies_matrices(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator).to(dtype).to(device) for _ in range(2))
    total = torch.empty(SIZE, SIZE, device=device)
    launch(_product, (1,), a, b, total, SIZE)
    torch.testing.assert_close(total, a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@triton.jit
def _copy(numbers, copies, size: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.arange(0, size)
    tl.store(copies + at, tl.load(numbers + at).to(copies.dtype.element_ty))


def test_a_kernel_rounds_to_bf16_as_torch_does(device: str) -> None:
    """The interpreter cut off what did not fit."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(4096, generator=draw) * 2.0 ** torch.randint(-40, 40, (4096,), generator=draw)
    numbers[:3] = torch.tensor([float("nan"), float("inf"), torch.finfo(torch.float32).max])
    copies = torch.empty(4096, dtype=torch.bfloat16, device=device)
    launch(_copy, (1,), numbers.to(device), copies, 4096)
    torch.testing.assert_close(copies.cpu(), numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("compiler", "expected"), [(None, False), ("/usr/bin/gcc", True)])
def test_without_a_compiler_no_kernel_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, expected: bool
) -> None:
    can_compile.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launching.shutil, "which", lambda name: compiler if name == "gcc" else None)
    assert can_compile() is expected
    can_compile.cache_clear()


@pytest.mark.parametrize(("capability", "compiled"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((10, 0), True)])
def test_kernels_are_for_gpus_that_multiply_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], compiled: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    compiles_for.cache_clear()
    assert compiles_for(torch.device("cuda")) is compiled
    assert not compiles_for(torch.device("cpu"))
    compiles_for.cache_clear()
