"""The device that a process computes on: whether it is of use after an error, and the way from it to the host.

Knows torch and memory: neither experts nor engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts_service.memory import give_back_freed

PROBE_BYTES = 16 * 2**20  # a device that has not even these left cannot run a step of one token
_ALIGNMENT = 16  # bytes; of arrays that are copied as one
FEW_THREADS = 4  # beside a GPU the host moves and counts, and multiplies nothing


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work might have gone well."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator, and CUDA's for pinned memory, raise what they raise for everything else.
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def check_device(device: torch.device, *, memory: bool = False) -> None:
    """Raises what the device raises when it is gone, or with `memory` when it has none left.

    After an error that sticks, everything that is asked of a CUDA context fails.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    if memory:
        torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device).fill_(1)


def give_back_unused(device: torch.device) -> None:
    """After loading: what conversions took is kept by torch's allocator, and by malloc; neighbours need it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_back_freed()


def on_host(tensor: Tensor) -> Tensor:
    """The same, contiguous in host memory; what is on a GPU in pinned memory, by one copy that is waited for."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return pinned(tensor.shape, tensor.dtype).copy_(tensor)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that a GPU reads and writes by itself. What is dropped while it does so, nobody gets before."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def pin(memory: Tensor) -> Callable[[], object] | None:
    """Have GPUs read and write host memory by themselves that is not torch's own; all of it, from its first byte.

    Returns what undoes it, before the memory is unmapped; None: the driver cannot.
    """
    with suppress(RuntimeError):  # of a device that is gone: what is computed there next says so
        driver = torch.cuda.cudart()
        address = memory.data_ptr()
        if not int(driver.cudaHostRegister(address, memory.nbytes, 0)):
            return partial(driver.cudaHostUnregister, address)
        torch.ones(1, device="cuda")  # takes the error away, which the next kernel would be blamed for
    return None


def wait_for_queue(device: torch.device) -> None:
    """All that the current stream has been told to do is done. Raises what the device raised in the meantime."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """These arrays there: by one copy from pinned memory that nobody waits for, or, on a CPU, as they lie."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    starts = np.cumsum([0, *sizes]).tolist()
    staged = pinned((starts[-1],), torch.uint8)
    for array, start in zip(arrays, starts, strict=False):
        staged[start : start + array.nbytes].copy_(torch.from_numpy(array.reshape(-1).view(np.uint8)))
    there = staged.to(device, non_blocking=True)  # torch gives the staged bytes to nobody before they have been read
    return [
        there[start:end][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, (start, end) in zip(tensors, pairwise(starts), strict=True)
    ]


class HostCopy:
    """A tensor on its way from a GPU to pinned host memory. The device's queue goes on; `wait` is for this alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor, None
        if tensor.device.type != "cpu":
            self._host = pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """What has arrived. Raises what the device raised in the meantime."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
