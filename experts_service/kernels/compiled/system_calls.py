"""What compiled code of lanes asks the C library for. Knows no frame and no slot."""

from __future__ import annotations

import platform

import numpy as np

from experts_service.kernels.compiled.jit import AVAILABLE, kernel, pointer

if AVAILABLE:
    from numba import carray, types

    from experts_service.kernels.compiled.jit import sched_yield as sched_yield

    _Bytes, _Size, _Int = types.voidptr, types.int64, types.int32
    send = types.ExternalFunction("send", _Size(_Int, _Bytes, _Size, _Int))
    recv = types.ExternalFunction("recv", _Size(_Int, _Bytes, _Size, _Int))
    memcpy = types.ExternalFunction("memcpy", _Bytes(_Bytes, _Bytes, _Size))
    epoll_wait = types.ExternalFunction("epoll_wait", _Int(_Int, _Bytes, _Int, _Int))
    _clock_gettime = types.ExternalFunction("clock_gettime", _Int(_Int, _Bytes))
    _errno = types.ExternalFunction("__errno_location", _Bytes())

NO_WAIT, NO_SIGNAL = 0x40, 0x4000  # flags of send and recv
AGAIN = 11  # an error number
CLOCK_BYTES = 16  # room for what `now` reads
# of one of epoll's events: its bytes, and where the descriptor is among them; without a gap on x86-64 alone
EVENT_BYTES, DESCRIPTOR_AT = (12, 4) if platform.machine() == "x86_64" else (16, 8)

_MONOTONIC = 1


@kernel
def error_number():  # type: ignore[no-untyped-def]
    """Of this thread's last call that failed."""
    return np.int64(carray(_errno(), 1, np.int32)[0])


@kernel
def now(clock):  # type: ignore[no-untyped-def]
    """Nanoseconds, monotonic. `clock`: the address of CLOCK_BYTES that nobody else needs meanwhile."""
    _clock_gettime(_MONOTONIC, pointer(clock))
    read = carray(pointer(clock), 2, np.int64)
    return read[0] * 1_000_000_000 + read[1]
