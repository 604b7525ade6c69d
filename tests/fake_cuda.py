"""A GPU that is not there: tensors say they are on one, and whatever would wait for it raises.

Under torch's FakeTensorMode operations compute shapes and devices, no values. So a mix of devices raises, and so does
what needs a value on the host: `item`, `tolist`, a mask as an index, `nonzero`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda:0")


class _Event:
    """Of a device on which all is done at once."""

    def record(self, _stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _WithoutGuards(TorchFunctionMode):
    """Has what a torch without CUDA does in C++, where it asks for the device, done by the dispatcher instead."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _WITHOUT_GUARD.get(func, func)(*args, **(kwargs or {}))


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]` of integers, slices, None, `...` and tensors."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is ... for part in parts):
        place = next(place for place, part in enumerate(parts) if part is ...)
        missing = tensor.dim() - sum(part is not None and part is not ... for part in parts)
        parts[place : place + 1] = [slice(None)] * missing
    tensors: list[torch.Tensor | None] = []
    dim = 0
    for part in parts:
        if isinstance(part, int):
            tensor = torch.ops.aten.select.int(tensor, dim, part)
            continue
        if part is None:
            tensor = torch.ops.aten.unsqueeze.default(tensor, dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            assert isinstance(part, torch.Tensor), "a list as an index is copied to the device, and waited for"
            tensors += [None] * (dim - len(tensors)) + [part]
        dim += 1
    return torch.ops.aten.index.Tensor(tensor, tensors) if tensors else tensor


_WITHOUT_GUARD: dict[Any, Any] = {
    torch.Tensor.__getitem__: _item,
    torch.Tensor.__invert__: torch.bitwise_not,
    torch.Tensor.contiguous: lambda tensor: torch.clone(tensor, memory_format=torch.contiguous_format),
    torch.Tensor.copy_: torch.ops.aten.copy_.default,
}


class Watch(TorchDispatchMode):
    """Counts operations, and copies between devices; one that is waited for raises."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.num_uploads = self.num_downloads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.num_operations += 1
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            if isinstance(source, torch.Tensor) and source.device.type != result.device.type:
                is_waited_for = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
                assert not is_waited_for, f"a copy from {source.device} to {result.device} that the host waits for"
                self.num_uploads += result.is_cuda
                self.num_downloads += not result.is_cuda
        return result


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Tensors made on DEVICE within are there as far as anybody can tell; tensors of the CPU may come in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda _device=None: None)
        with _WithoutGuards(), FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            yield watch
