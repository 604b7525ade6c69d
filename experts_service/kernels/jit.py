"""What compiled CPU kernels are made of: numba's compiler, set up once, and operations it lacks. Knows no kernel.

Arrays of bf16 are passed as their bits, uint16: numba has no such type. `widen` and `narrow` compile to an instruction
or a few, and vectorise. Sums are written with `fma`, which rounds once: their bits depend neither on the compiler's
choices nor on the CPU, and nothing is reordered unless a kernel asks for it.

What was compiled is kept by numba, keyed by the CPU's features, in a directory of this user that is keyed by what
kernels share: numba sees changes of a kernel's own file alone. Where there is no such directory every process compiles;
where numba cannot be imported AVAILABLE is false, no kernel can be called, and torch does the work.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

try:
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic as _untyped_intrinsic

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile it when it is called first, for the types it is called with. It runs without the GIL.

    Division by zero gives infinity or NaN, and indices are not checked: a kernel's caller vouches for its shapes.
    """
    if not AVAILABLE:
        return function
    return cast("Function", numba.njit(nogil=True, error_model="numpy", cache=_CACHED)(function))


def _cache_directory() -> Path | None:
    """Where machine code is kept: of this user alone, since what lies there is run. None where that cannot be had."""
    shared = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "manta" / "kernels" / f"numba-{numba.__version__}-{shared}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except (OSError, RuntimeError):  # not writable; a user without a home
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return directory if ours and os.access(directory, os.W_OK) else None


def _intrinsic(function: Function) -> Function:
    return cast("Function", _untyped_intrinsic(function))


if AVAILABLE:
    _directory = _cache_directory()
    _CACHED = _directory is not None
    if _directory is not None:
        numba.config.CACHE_DIR = str(_directory)

    @_intrinsic
    def widen(_context: Any, _bits: Any) -> Any:
        """Bits of a bf16, uint16 → the same number in float32. Exact."""

        def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            wide = builder.zext(arguments[0], ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), ir.FloatType())

        return types.float32(types.uint16), build

    @_intrinsic
    def narrow(_context: Any, _value: Any) -> Any:
        """A float32 → bits of the nearest bf16, uint16, ties to even as torch does it. NaN stays NaN."""

        def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            bits = builder.bitcast(arguments[0], ir.IntType(32))

            def constant(value: int) -> Any:
                return ir.Constant(bits.type, value)

            lowest_kept = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            rounded = builder.lshr(builder.add(bits, builder.add(lowest_kept, constant(0x7FFF))), constant(16))
            is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
            return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), ir.IntType(16))

        return types.uint16(types.float32), build

    @_intrinsic
    def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
        """a · b + c of float32, rounded once."""

        def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.fma(*arguments)

        return types.float32(types.float32, types.float32, types.float32), build
