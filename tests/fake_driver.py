# ruff: noqa: N802  # names are the driver's
"""A GPU's driver whose device memory is the host's: a memfd, which other processes map by its descriptor.

`install` puts it where cuda-bindings would be. What it says is as the driver says it: a tuple, the error first. Its
device is torch's CPU, so what stands beside it is the product's own code, on real memory of two real processes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts_service.device_memory import DeviceMemory
from tests import memory

DEVICE = torch.device("cpu")
NAME = "fake-device"
_MODULE = "cuda.bindings.driver"
_FIXED, _NONE = 0x10, 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """One process's. `refuses`: calls that fail, by name."""

    CUresult = CUresult
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self, refuses: dict[str, CUresult] | None = None) -> None:
        self.refuses = refuses or {}
        self.copies = 0  # to slots and from them
        self.damages = False  # what is copied into memory arrives otherwise
        self.refuses_access_to_imports = False
        self.accessible: set[int] = set()  # addresses that copies may use
        self._imported_handles: set[int] = set()
        self._imported: set[int] = set()  # addresses

    def __getattribute__(self, name: str) -> Any:
        refuses = {} if name.startswith("_") else object.__getattribute__(self, "__dict__").get("refuses", {})
        if name in refuses:
            return lambda *_: (refuses[name], None)
        return object.__getattribute__(self, name)

    @staticmethod
    def CUmemAllocationProp() -> Any:
        return SimpleNamespace(type=0, location=SimpleNamespace(type=0, id=-1), requestedHandleTypes=0)

    @staticmethod
    def CUmemAccessDesc() -> Any:
        return SimpleNamespace(location=SimpleNamespace(type=0, id=-1), flags=0)

    def cuMemCreate(self, size: int, wanted: Any, flags: int) -> tuple[CUresult, int]:
        assert (wanted.type, wanted.location.type, wanted.location.id, wanted.requestedHandleTypes) == (1, 1, 0, 1)
        assert size % (2 << 20) == flags == 0
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return CUresult.CUDA_SUCCESS, descriptor

    def cuMemRelease(self, handle: int) -> tuple[CUresult]:
        self._imported_handles.discard(handle)
        os.close(handle)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> tuple[CUresult, int]:
        assert (kind, flags) == (1, 0)
        return CUresult.CUDA_SUCCESS, os.dup(handle)

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: int) -> tuple[CUresult, int | None]:
        assert kind == 1
        if NAME not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        handle = os.dup(descriptor)
        self._imported_handles.add(handle)
        return CUresult.CUDA_SUCCESS, handle

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[CUresult, int]:
        assert alignment == address == flags == 0
        place = _libc.mmap(None, size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        return CUresult.CUDA_SUCCESS, int(place)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[CUresult]:
        assert offset == flags == 0
        if os.fstat(handle).st_size != size:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        assert _libc.mmap(address, size, rights, mmap.MAP_SHARED | _FIXED, handle, 0) == address
        (self._imported.add if handle in self._imported_handles else self._imported.discard)(address)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[CUresult]:
        assert len(access) == count == 1
        assert (access[0].location.type, access[0].location.id, access[0].flags) == (1, 0, 3)
        if self.refuses_access_to_imports and address in self._imported:
            return (CUresult.CUDA_ERROR_INVALID_DEVICE,)
        self.accessible.add(address)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[CUresult]:
        self.accessible.discard(address)
        self._imported.discard(address)
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        assert _libc.mmap(address, size, _NONE, anonymous, -1, 0) == address
        return (CUresult.CUDA_SUCCESS,)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[CUresult]:
        assert _libc.munmap(address, size) == 0
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyAsync(self, to: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 0
        self.copies += 1
        ctypes.memmove(to, source, size)
        if self.damages and any(0 <= to - start < 1 << 40 for start in self.accessible):
            ctypes.memset(to, 0, 1)
            ctypes.memset(to + 1, 0, 1)
        return (CUresult.CUDA_SUCCESS,)


def _tensor(memory: DeviceMemory) -> Tensor:
    """As torch would take it from a GPU: it keeps the memory."""
    data = (ctypes.c_uint8 * memory._size).from_address(memory._address)
    data.memory = memory  # type: ignore[attr-defined]
    return torch.from_numpy(np.ctypeslib.as_array(data))


def install(driver: FakeDriver | None = None) -> FakeDriver:
    """For this process, for good; a test uses `monkeypatch` for what it has to have back."""
    driver = driver or FakeDriver()
    sys.modules[_MODULE] = driver  # type: ignore[assignment]
    DeviceMemory.tensor = _tensor  # type: ignore[method-assign]
    return driver


def mappings(process: int | str = "self") -> int:
    """How many such memories a process maps."""
    return memory.mappings(NAME, process)


def descriptors() -> int:
    """How many this one has open."""
    return memory.descriptors(NAME)
