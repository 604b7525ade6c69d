"""Memory of a GPU that two processes map, by file descriptor. Knows the driver; knows no slot and no frame.

    memory, descriptor = create(size, device)         one process, which computes on that device and may use `tensor`
    memory = open_shared(descriptor, size, device)    the other, on a device of its own: it copies in and out

The driver keeps such memory until nobody maps it and no descriptor of it is open. So a process that is killed takes it
from nobody, and the last one that ends leaves nothing. (What a pool has, cuda.core's `DeviceMemoryResource`, has to be
freed by who imported it before it is by who made it: a killed process does not wait.)
"""

from __future__ import annotations

import importlib
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from experts_service.device import wait_for_queue

GRANULE = 2 * 2**20  # of a GPU's memory; sizes are multiples of it


class NotShared(RuntimeError):
    """The driver does not do it, between these processes or at all. Says what it answered."""


def granules(size: int) -> int:
    """As many bytes, or the next ones that are whole granules."""
    return -(-size // GRANULE) * GRANULE


class DeviceMemory:
    """One mapping. It lasts as long as something refers to it or to its tensor, and is used by one thread."""

    def __init__(self, driver: Any, handle: Any, size: int, device: torch.device) -> None:
        """Map `handle`, which stays the caller's, for `device`. Raises NotShared."""
        self._driver, self._size = driver, size
        self.device = device
        self._address = address = int(_call(driver, "cuMemAddressReserve", size, 0, 0, 0))
        try:
            _call(driver, "cuMemMap", address, size, 0, handle, 0)
            try:
                access = driver.CUmemAccessDesc()
                access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
                access.location.id = _index(device)
                access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                _call(driver, "cuMemSetAccess", address, size, [access], 1)
            except BaseException:
                driver.cuMemUnmap(address, size)
                raise
        except BaseException:
            driver.cuMemAddressFree(address, size)
            raise
        weakref.finalize(self, _unmap, driver, address, size, device).atexit = False  # the process's end does it

    def tensor(self) -> Tensor:
        """All of it, uint8, for who made it: torch takes it for memory of the device that it lies on."""
        interface = {"shape": (self._size,), "typestr": "|u1", "data": (self._address, False), "version": 3}
        return torch.as_tensor(_Interface(self, interface), device=self.device)

    def write(self, at: int, data: Tensor) -> None:
        """Copy `data`, contiguous and on the device, to the bytes from `at` on, when it is the queue's turn."""
        self._copy(self._address + at, data.data_ptr(), data.nbytes)

    def read(self, at: int, into: Tensor) -> None:
        """Copy the bytes from `at` on to `into`, contiguous and on the device, when it is the queue's turn."""
        self._copy(into.data_ptr(), self._address + at, into.nbytes)

    def _copy(self, to: int, source: int, size: int) -> None:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        _call(self._driver, "cuMemcpyAsync", to, source, size, stream)


class _Interface:
    """Memory as torch is told of it, which keeps this and so the memory."""

    def __init__(self, memory: DeviceMemory, interface: dict[str, Any]) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = interface


def create(size: int, device: torch.device) -> tuple[DeviceMemory, int]:
    """`size` bytes, whole granules, and the descriptor to send. Raises NotShared, or what the device raises."""
    driver = _driver(device)
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = _index(device)
    wanted.requestedHandleTypes = _descriptors(driver)
    handle = _call(driver, "cuMemCreate", size, wanted, 0)
    try:
        memory = DeviceMemory(driver, handle, size, device)
        return memory, int(_call(driver, "cuMemExportToShareableHandle", handle, _descriptors(driver), 0))
    finally:
        driver.cuMemRelease(handle)  # the mapping keeps the memory


def open_shared(descriptor: int, size: int, device: torch.device) -> DeviceMemory:
    """What another process made, which may be on a device that cannot be seen here. `descriptor` stays the caller's.

    Raises NotShared: `device` does not reach that memory, or there is less of it.
    """
    driver = _driver(device)
    handle = _call(driver, "cuMemImportFromShareableHandle", descriptor, _descriptors(driver))
    try:
        return DeviceMemory(driver, handle, size, device)
    finally:
        driver.cuMemRelease(handle)


def _driver(device: torch.device) -> Any:
    """Its calls, with the device's context this thread's."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")  # comes with torch for CUDA
    except ImportError as error:
        raise NotShared(f"the package cuda-bindings: {error}") from error
    torch.zeros(1, device=device)
    return driver


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    error, *values = getattr(driver, name)(*arguments)
    if int(error):
        raise NotShared(f"{name}: {getattr(error, 'name', error)}")
    return values[0] if values else None


def _descriptors(driver: Any) -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _index(device: torch.device) -> int:
    index: int | None = device.index
    if index is None:
        return torch.cuda.current_device() if device.type == "cuda" else 0
    return index


def _unmap(driver: Any, address: int, size: int, device: torch.device) -> None:
    with suppress(RuntimeError):  # of a device that is gone
        wait_for_queue(device)
    driver.cuMemUnmap(address, size)
    driver.cuMemAddressFree(address, size)
