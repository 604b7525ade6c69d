"""A GPU that computes nothing: tensors on `cuda:0` without memory, and a count of what a real one would be asked for.

What no GPU could do raises: tensors of two devices in one operation, and whatever needs a number of the device on the
host (`.item()`, `.tolist()`, `.numpy()`, `nonzero`, indexing by a mask). Copies that the host waits for are counted.
What a `HostCopy` brings is made up: integers count up in each row, other numbers are zero, and all is true.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from experts_service import device
from experts_service.kernels.gpu import launch as launching

DEVICE = torch.device("cuda:0")
_ALLOCATE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_VIEWS = {"detach_", "_unsafe_view"}  # though their signatures do not say so
_COPY = {"_to_copy", "copy_"}


@dataclass
class Counts:
    """Of what was done since the last look."""

    launches: Counter[str] = field(default_factory=Counter)  # kernels by name: torch's operations, and ours
    waits: Counter[str] = field(default_factory=Counter)  # of the host for the device, by the cause
    kernels: Counter[tuple[object, ...]] = field(default_factory=Counter)  # ours, each with what it is compiled for
    copies_to_device: int = 0
    copies_to_host: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def copy(self) -> Counts:
        return self - Counts()

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.launches - other.launches,
            self.waits - other.waits,
            self.kernels - other.kernels,
            self.copies_to_device - other.copies_to_device,
            self.copies_to_host - other.copies_to_host,
            self.bytes_to_device - other.bytes_to_device,
            self.bytes_to_host - other.bytes_to_host,
        )


class _Watch(TorchDispatchMode):
    """Counts the operations that reach a device. Those that are made of others are looked at one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _COPY:
            self._copied(name, args, kwargs, result)
        elif func.namespace != "prim" and not func.is_view and name not in _ALLOCATE | _VIEWS and _is_on_gpu(result):
            self.counts.launches[name] += 1
        return result

    def _copied(self, name: str, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        source = args[1] if name == "copy_" else args[0]
        if source.device == result.device:
            if result.is_cuda:
                self.counts.launches[name] += 1
            return
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if result.is_cuda:
            self.counts.copies_to_device += 1
            self.counts.bytes_to_device += result.nbytes
        else:
            self.counts.copies_to_host += 1
            self.counts.bytes_to_host += result.nbytes
        if blocking:
            self.counts.waits["to device" if result.is_cuda else "to host"] += 1


class _HostCopy:
    """In place of one. Copies come in the order in which they began, so only what began last is waited for."""

    counts: Counts
    began: int
    arrived: int

    def __init__(self, tensor: torch.Tensor) -> None:
        cls = type(self)
        cls.counts.bytes_to_host += tensor.nbytes
        cls.counts.copies_to_host += 1
        cls.began += 1
        self._number, self._shape, self._dtype = cls.began, tensor.shape, tensor.dtype

    def wait(self) -> torch.Tensor:
        cls = type(self)
        if self._number > cls.arrived:
            cls.arrived = cls.began
            cls.counts.waits["copy to host"] += 1
        with unset_fake_temporarily():
            if self._dtype.is_floating_point or self._dtype is torch.bool:
                return torch.full(self._shape, self._dtype is torch.bool, dtype=self._dtype)
            return torch.arange(self._shape[-1], dtype=self._dtype).expand(self._shape).contiguous()


class _Methods(TorchFunctionMode):
    """`x[…]` of tensors of a GPU in terms of operations: torch without CUDA does not get that far.

    And what has been copied to the host is numbers there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].is_cuda:
            return _indexed(*args)
        if func is torch.Tensor.__setitem__ and args[0].is_cuda:
            target, index, value = args
            return torch.ops.aten.copy_(_indexed(target, index), value)
        if func is torch.Tensor.__invert__:
            return torch.ops.aten.bitwise_not(*args)
        if func is torch.Tensor.contiguous and args[0].is_cuda:
            return (
                args[0]
                if args[0].is_contiguous()
                else torch.ops.aten.clone(*args, memory_format=torch.contiguous_format)
            )
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args, **(kwargs or {}))
        if func in (torch.Tensor.numpy, torch.Tensor.tolist) and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return func(*args)
        return func(*args, **(kwargs or {}))


def _indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            x = x.unsqueeze(dim)
        elif isinstance(one, int):
            x = x.select(dim, one)
            continue
        elif isinstance(one, slice):
            start, end, stride = one.indices(x.shape[dim])
            x = torch.ops.aten.slice(x, dim, start, end, stride)
        else:
            assert one.dtype is not torch.bool, "the host waits for the device to know how many are chosen"
            x = x.index_select(dim, one)
        dim += 1
    return x


def _made_for(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """What Triton compiles it anew for: constants, whether pointers and numbers are multiples of 16, a number of 1."""
    parameters = inspect.signature(kernel.fn).parameters
    # In the interpreter it keeps what `triton.jit` was told.
    general = getattr(kernel, "kwargs", {}).get("do_not_specialize") or getattr(kernel, "do_not_specialize", None) or ()
    for name, value in (dict(zip(parameters, arguments, strict=False)) | constants).items():
        if isinstance(value, torch.Tensor):
            yield name, value.dtype, value.storage_offset() * value.itemsize % 16 == 0
        elif not isinstance(value, int) or name not in parameters or "constexpr" in str(parameters[name].annotation):
            yield name, value
        elif name in general:
            yield name, value.bit_length() > 31
        else:
            yield name, value == 1, value % 16 == 0, value.bit_length() > 31


def _is_on_gpu(result: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return result.is_cuda
    return isinstance(result, (tuple, list)) and any(_is_on_gpu(one) for one in result)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Iterator[Counts]:
    """Within it `DEVICE` is there; kernels of ours are not run, but have to be given tensors of it and no others."""
    watch = _Watch()
    launch = launching.launch
    launching.compiles_for.cache_clear()

    def launched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        assert all(isinstance(number, int) and number > 0 for number in grid), f"a grid of {grid}"
        for argument in (*arguments, *constants.values()):
            assert not isinstance(argument, torch.Tensor) or argument.is_cuda, f"{kernel} got a tensor of the host"
        watch.counts.launches[kernel.fn.__name__] += 1
        watch.counts.kernels[kernel.fn.__name__, *_made_for(kernel, arguments, constants)] += 1

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        host_copy = type("HostCopy", (_HostCopy,), {"counts": watch.counts, "began": 0, "arrived": 0})
        for module in list(sys.modules.values()):
            if getattr(module, "launch", None) is launch:
                patched.setattr(module, "launch", launched)
            if getattr(module, "HostCopy", None) is device.HostCopy and module is not device:
                patched.setattr(module, "HostCopy", host_copy)
        with FakeTensorMode(), watch, _Methods():
            yield watch.counts
    for module in list(sys.modules.values()):
        if getattr(module, "launch", None) is launched:  # it was imported meanwhile
            module.launch = launch  # type: ignore[attr-defined]
    launching.compiles_for.cache_clear()
