"""Compiles as `manta serve` has it done, warms up as a coordinator does, and compiles again as the next start does."""

from __future__ import annotations

import subprocess
import sys

from experts_service.kernels.compiled import jit

COMPILE = [sys.executable, "-m", "router_service.compile_kernels", "bfloat16"]
NO_TORCH = """
import sys
from router_service.compile_kernels import compile_kernels

compile_kernels(["bfloat16"])
print("torch" if "torch" in sys.modules else "no torch")
"""

if __name__ == "__main__":
    subprocess.run(COMPILE, check=True)
    compiled: list[object] = []

    def save(_cache: object, sig: object, _data: object) -> None:
        compiled.append(sig)

    jit._Cache.save_overload = save  # type: ignore[attr-defined]

    import torch

    from experts_service.kernels.compiled.matmul import load_kernels
    from router_service import rows
    from router_service.attention import paged
    from router_service.sampling.sampler import Sampler

    load_kernels()
    rows.warm_up(torch.bfloat16, torch.device("cpu"))
    paged.warm_up(torch.bfloat16)
    Sampler(frozenset({1})).warm_up()
    print(f"{len(compiled)} kernels compiled after it", flush=True)
    subprocess.run([sys.executable, "-c", NO_TORCH], check=True)
