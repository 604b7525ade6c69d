"""A process that compiles what a model's steps call on a CPU, so that those that serve it need not. Knows no model.

    python -m router_service.compile_kernels bfloat16 float32:int8

`manta serve` starts it before Ray, whose start mostly waits. It needs no answer: a process that comes to a kernel which
is being compiled waits for it, and compiles what is missing itself.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from experts_service.kernels.compiled.jit import AVAILABLE, cache_directory, cpu_features

_SOURCES = (
    "../experts_service/carriers/exchange_kernels.py",
    "../experts_service/kernels/finite.py",
    "../experts_service/shard/serve_kernel.py",
    "row_kernels.py",
    "attention/paged_kernels.py",
    "sampling/compiled_adjust.py",
    "sampling/compiled_draw.py",
    "outputs/top.py",
)


def compile_kernels(dtypes: Sequence[str]) -> None:
    """Those of models of these dtypes, with keys and values in what stands behind a colon.

    Nothing is done where that was done before, or what is compiled is not kept.
    """
    directory = cache_directory()
    if not AVAILABLE or directory is None:
        return
    done = directory / f"compiled-{_key(dtypes)}"
    if done.exists():
        return  # a start whose kernels are all there is not to import torch once more
    import torch

    if torch.cuda.is_available():
        return
    from experts_service.carriers import exchange_kernels
    from experts_service.kernels import finite
    from experts_service.kernels.compiled.matmul import load_kernels
    from experts_service.shard import serve_kernel
    from router_service import rows
    from router_service.attention import paged
    from router_service.sampling.sampler import Sampler

    cpu = torch.device("cpu")
    for lanes in (finite, exchange_kernels, serve_kernel):
        lanes.load()
    for name, _, kept_in in (named.partition(":") for named in dtypes):
        dtype = getattr(torch, name)
        if dtype is torch.bfloat16:
            load_kernels()
        paged.warm_up(dtype, of_codes=kept_in == "int8")
        rows.warm_up(dtype, cpu)
    Sampler(frozenset()).warm_up()
    with suppress(OSError):
        done.touch()


def _key(dtypes: Sequence[str]) -> str:
    """Of the CPU and of what would be compiled; files beside jit.py are in the directory's name."""
    sources = [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
    return hashlib.sha256(repr((cpu_features(), sorted(dtypes), sources)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    compile_kernels(sys.argv[1:])
