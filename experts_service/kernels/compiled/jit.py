"""What compiled CPU kernels are made of: numba's compiler, set up once, and operations it lacks. Knows no kernel.

Arrays of bf16 are passed as their bits, uint16: numba has no such type. `widen` and `narrow` compile to an instruction
or a few, and vectorise. Sums are written with `fma`, which rounds once: their bits depend neither on the compiler's
choices nor on the CPU, and nothing is reordered unless a kernel asks for it.

What was compiled is kept by numba, keyed by the CPU's features, in a directory of this user that is keyed by the files
beside this one, which kernels share: numba sees changes of a kernel's own file alone. Where there is no such directory
every process compiles, and so it does where what was kept cannot be read or no more can be kept. Where numba cannot be
imported, or is told to compile nothing, AVAILABLE is false, no kernel can be called, and torch does the work.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

try:
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.core.caching import FunctionCache
    from numba.core.ccallback import CFunc
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic as _untyped_intrinsic

    AVAILABLE = (
        not numba.config.DISABLE_JIT
    )  # NUMBA_DISABLE_JIT=1 leaves functions of Python, which no thread can share
except ImportError:
    AVAILABLE = False

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile it when it is called first, for the types it is called with. It runs without the GIL.

    Division by zero gives infinity or NaN, and indices are not checked: a kernel's caller vouches for its shapes.
    """
    if not AVAILABLE:
        return function
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    _keep(compiled, function)
    return cast("Function", compiled)


def cpu_features() -> str:
    """Name and features of this CPU, in LLVM's words."""
    return ",".join(cpu_target.target_context.codegen().magic_tuple()[1:]) if AVAILABLE else platform.processor()


def cpu_has(feature: str) -> bool:
    """Whether kernels may use a feature of this CPU, by LLVM's name."""
    return f"+{feature}" in cpu_features().split(",")


def cache_directory() -> Path | None:
    """Where what was compiled and measured is kept, if anywhere."""
    return _directory


def compile_routine(function: Callable[[Any], None]) -> int:
    """The address of a C function `void (int64_t *)` made of it: compiled now, or read from where it was kept.

    Of processes that start together one compiles it, and the others wait for it, or compile another one meanwhile.
    """
    signature = types.void(types.CPointer(types.int64))  # type: ignore[attr-defined]
    with one_process(f"compiling-{function.__module__}.{function.__name__}"):
        routine = CFunc(function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"})
        _keep(routine, function)
        routine.compile()
    _routines.append(routine)
    return int(cast("int", routine.address))


@contextmanager
def one_process(doing: str) -> Iterator[None]:
    """Of all that share the directory one is doing this; the others wait. All do where files cannot be locked."""
    with ExitStack() as stack:
        if _directory is not None:
            with suppress(OSError):  # a home on a network's disk may know no locks, a full disk has no room for a file
                lock = stack.enter_context((_directory / f"{doing}.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find_cache_directory() -> Path | None:
    """Where machine code is kept: of this user alone, since what lies there is run. None where that cannot be had."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    shared = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not home.is_absolute():  # to be ignored, says its standard: each process would have another one
            home = Path.home() / ".cache"
        directory = home / "manta" / "kernels" / f"numba-{numba.__version__}-{shared}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except (OSError, RuntimeError):  # not writable; a user without a home
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return directory if ours and os.access(directory, os.W_OK) else None


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator of what is written as LLVM's instructions; kernels call it without the first argument."""
    if not AVAILABLE:
        return function
    return cast("Callable[..., Any]", _untyped_intrinsic(function))


_directory: Path | None = None
_routines: list[Any] = []  # their machine code lives as long as they do

if AVAILABLE:
    _directory = _find_cache_directory()
    if _directory is not None:
        numba.config.CACHE_DIR = str(_directory)

    class _Cache(FunctionCache):  # type: ignore[misc]
        """numba's, whose files no start hangs on; one process at a time, or two types get one file's name."""

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            """None where it has to be compiled."""
            try:
                with one_process("keeping"):
                    return super().load_overload(sig, target_context)
            except Exception:  # cut off, when the machine went down or the disk was full: unpickling raises anything
                with suppress(OSError), one_process("keeping"):
                    self.flush()
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            """Where there is room for it."""
            with suppress(OSError), one_process("keeping"):
                super().save_overload(sig, data)

    def _keep(compiled: Any, function: Callable[..., Any]) -> None:
        """Have numba read it from the directory and write it there."""
        if _directory is not None:
            with suppress(RuntimeError):  # it cannot make a directory of its own in there
                compiled._cache = _Cache(function)

    sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def widen(_context: Any, _bits: Any) -> Any:
    """Bits of a bf16, uint16 → the same number in float32. Exact."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
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


@intrinsic
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a · b + c of float32, rounded once."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def bits(_context: Any, _value: Any) -> Any:
    """Bits of a float32, int32."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def from_bits(_context: Any, _bits: Any) -> Any:
    """The float32 with these bits, int32."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    """An address, int64, as what `numba.carray` takes."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def take(_context: Any, _counter: Any) -> Any:
    """What an int64 counts, and one more for the next thread that asks, who sees what was written before."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.CPointer(types.int64)), build  # type: ignore[attr-defined]


@intrinsic
def take_several(_context: Any, _counter: Any, _number: Any) -> Any:
    """What an int64 counts, and so many more for the next thread that asks, who sees what was written before."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], arguments[1], "acq_rel")

    return types.int64(types.CPointer(types.int64), types.int64), build  # type: ignore[attr-defined]


@intrinsic
def counter(_context: Any, _task: Any, _index: Any) -> Any:
    """One of a task's numbers, to be counted up."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return types.CPointer(types.int64)(types.CPointer(types.int64), types.int64), build  # type: ignore[attr-defined]


@intrinsic
def seen(_context: Any, _counter: Any) -> Any:
    """What an int64 counts; what was written before it was counted is seen from here on."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(arguments[0], "acquire", align=8)

    return types.int64(types.CPointer(types.int64)), build  # type: ignore[attr-defined]


@intrinsic
def call(_context: Any, _function: Any, _task: Any) -> Any:
    """Call the C function `void (int64_t *)` at an address."""

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64).as_pointer()])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.CPointer(types.int64)), build  # type: ignore[attr-defined]


@intrinsic
def number_at(_context: Any, _address: Any) -> Any:
    """The int64 at an address, to be looked at or counted up."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), build  # type: ignore[attr-defined]


@intrinsic
def exchange(_context: Any, _number: Any, _expected: Any, _new: Any) -> Any:
    """Make `new` of an int64 that is `expected`; what it was. Who sees it sees what was written before."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        both = builder.cmpxchg(*arguments, "acq_rel", "acquire")
        return builder.extract_value(both, 0)

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), build  # type: ignore[attr-defined]


@intrinsic
def call_in_threads(_context: Any, _parallel: Any, _function: Any, _task: Any, _threads: Any) -> Any:
    """Have OpenMP's `GOMP_parallel`, which is at an address, call a function in so many threads."""

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, address, number, number])
        threads = builder.trunc(arguments[3], number)
        parallel = builder.inttoptr(arguments[0], kind.as_pointer())
        given = [builder.inttoptr(argument, address) for argument in arguments[1:3]]
        builder.call(parallel, [*given, threads, ir.Constant(number, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build
