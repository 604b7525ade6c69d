"""Kernels for GPUs are started by one function, here through Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Parameter:
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False


@dataclass
class Compiled:
    """What is compiled for one kind of arguments."""

    started: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.started.append((grid, *arguments))


class Kernel:
    """Compiles when it is started, as Triton's do."""

    params = (Parameter("x"), Parameter("num_rows", do_not_specialize=True), Parameter("stride"), Parameter("N", True))

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*_: Any, **__: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return start


class OnAnotherCard(torch.Tensor):
    def get_device(self) -> int:
        return 1


def test_what_was_compiled_is_started_again_for_the_same_kind_of_arguments() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, (3,), x, 5, 7, N=8, num_warps=4)
    launch(kernel, (4, 2), x[4:], 9, 9, N=8, num_warps=4)  # another length, place and number, all of one kind
    [compiled] = kernel.compiled
    [(grid, pointer, *numbers)] = compiled.started
    assert (grid, numbers) == ((4, 2, 1), [9, 9, 8])
    assert torch.equal(pointer, x[4:])


@pytest.mark.parametrize(
    ("others", "constants"),
    [
        ((torch.zeros(64)[1:], 5, 7), {}),  # a pointer that is no multiple of 16
        ((torch.zeros(64, dtype=torch.bfloat16), 5, 7), {}),
        ((torch.zeros(64), 5, 1), {}),
        ((torch.zeros(64), 5, 32), {}),
        ((torch.zeros(64), 5, 2**40), {}),
        ((None, 5, 7), {}),
        ((torch.zeros(64), 5, 7), {"N": 9}),
        ((torch.zeros(64), 5, 7), {"num_warps": 8}),
        ((torch.zeros(64).as_subclass(OnAnotherCard), 5, 7), {}),
        ((torch.zeros(64), True, 7), {}),
        ((torch.zeros(64), torch.zeros(64), 7), {}),
    ],
)
def test_another_kind_is_compiled_for_itself(others: tuple[Any, ...], constants: dict[str, int]) -> None:
    """What is compiled for pointers that are multiples of 16 reads past the others, and is loaded by one card."""
    kernel, usual = Kernel(), {"N": 8, "num_warps": 4}
    launch(kernel, (1,), torch.zeros(64), 5, 7, **usual)
    launch(kernel, (1,), *others, **usual | constants)
    assert len(kernel.compiled) == 2
    assert not any(compiled.started for compiled in kernel.compiled)


def test_a_pointer_that_nothing_is_specialised_for_has_a_type() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, (1,), x, x, 7, N=8)
    launch(kernel, (1,), x, x.bfloat16(), 7, N=8)
    assert len(kernel.compiled) == 2


def test_an_option_is_told_by_its_name() -> None:
    """Else four stages would be started as four warps."""
    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, (1,), x, 5, 7, N=8, num_warps=4)
    launch(kernel, (1,), x, 5, 7, N=8, num_stages=4)
    assert len(kernel.compiled) == 2


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
