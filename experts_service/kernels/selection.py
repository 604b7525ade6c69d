"""Chooses the kernel of a process: what the configuration says, else what is fastest here. Knows no layer.

One kernel serves all matrices and all numbers of rows: each packs weights in a layout of its own, and two would keep
them twice. Ours are batch-invariant: the bits of a row are the same in any batch. A library's are not, and it is the
faster one where the CPU has matrix units (AMX), which ours do not use.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from cluster.errors import ConfigError
from cluster.telemetry.kernels import ProcessKernels
from experts_service.kernels.compiled.jit import AVAILABLE, cpu_features
from experts_service.kernels.compiled.matmul import load_kernels
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.kernel import Kernel, available
from experts_service.kernels.speeds import ROWS, Speeds, speeds

MAX_COST = 1.1  # times the time of the fastest: what batch invariance may cost by itself

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The kernel of a process. As text, one line for the log."""

    kernel: Kernel
    speeds: Speeds  # what was measured; empty where nothing had to be

    @property
    def batch_invariant(self) -> bool:
        """Whether the matmuls' bits depend on nothing but the row."""
        return self.kernel.batch_invariant

    def told(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        attention: str = "",
        sampling: str = "",
        batch_invariant: bool = True,
        weights: str = "",
    ) -> ProcessKernels:
        """What a process says of itself, a coordinator also of what else computes there, and whether that is.

        `weights`: what its matrices were rounded to.
        """
        on_cpu = device.type == "cpu"
        return ProcessKernels(
            dtype=str(dtype).removeprefix("torch."),
            matmuls=str(self.kernel),
            batch_invariant=self.batch_invariant and batch_invariant,
            device=cpu_features().split(",")[0] if on_cpu else torch.cuda.get_device_name(device),
            vectors=torch.backends.cpu.get_cpu_capability() if on_cpu else "",
            attention=attention,
            sampling=sampling,
            speeds=tuple((str(kernel), tuple(seconds)) for kernel, seconds in self.speeds.items()),
            rows=ROWS if self.speeds else (),
            weights=weights,
        )

    def __str__(self) -> str:
        invariant = "" if self.batch_invariant else "not "
        measured = "; ".join(
            f"{kernel} {' '.join(f'{1e3 * s:.2f}' for s in seconds)}" for kernel, seconds in self.speeds.items()
        )
        rows = ", ".join(map(str, ROWS))
        return (
            f"matmuls: {self.kernel}, {invariant}batch-invariant"
            + (f" (ms of {rows} rows on one thread: {measured})" if measured else "")
            + ("" if AVAILABLE else "; numba cannot be imported or compiles nothing, so torch computes")
        )


def select(
    dtype: torch.dtype, device: torch.device, *, kernels: str = "auto", batch_invariant: str = "auto"
) -> Selection:
    """For a model of `dtype` on `device`, and ready to run; the settings are those of `EngineConfig`.

    Raises ConfigError where this CPU or this installation cannot do what they say.
    """
    selection = _select(dtype, device, kernels, batch_invariant)
    if selection.kernel.is_own:
        load_kernels()
    return selection


def _check_bf16(device: torch.device) -> None:
    """Raises ConfigError for a card that multiplies none: torch would do it number by number, or not at all."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ConfigError(
            f"engine.dtype: {torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) "
            "has no bfloat16; set float32, which takes 4 bytes a weight and runs launch by launch, or take a GPU of "
            "8.0 or later"
        )


def _select(dtype: torch.dtype, device: torch.device, kernels: str, batch_invariant: str) -> Selection:
    if device.type == "cuda" and dtype is torch.bfloat16:
        _check_bf16(device)
    if device.type != "cpu" or dtype is not torch.bfloat16:
        if device.type == "cuda" and not compiles_for(device):
            logger.warning(
                "no kernels of ours run on this GPU, for want of Triton, of a C compiler or of compute capability 8.0: "
                "experts are multiplied one by one, and quantised weights are widened and take more memory than planned"
            )
        elif device.type == "cuda" and batch_invariant == "on":
            return Selection(Kernel.TRITON, {})
        if batch_invariant == "on":
            logger.warning(
                "engine.batch_invariant: on has no effect: torch multiplies %s on %s, and rounds by the number of rows",
                str(dtype).removeprefix("torch."),
                device.type,
            )
        return Selection(Kernel.TORCH, {})
    here = available()
    if kernels != "auto":
        if kernels not in here:
            raise ConfigError(f"engine.kernels: {kernels} does not run here; {', '.join(here)} do")
        here = (Kernel(kernels),)
    own = [kernel for kernel in here if kernel.is_own]
    if batch_invariant == "on":
        if not own:
            raise ConfigError(f"engine.batch_invariant: on needs a kernel of our own, and {', '.join(here)} are not")
        return Selection(own[0], {})
    if len(here) == 1:
        return Selection(here[0], {})
    return choose(speeds(here), prefers_own=batch_invariant == "auto")


def choose(measured: Speeds, *, prefers_own: bool) -> Selection:
    """The fastest by the geometric mean over numbers of rows; one of ours also if it is almost as fast."""
    means = {kernel: math.exp(sum(map(math.log, seconds)) / len(seconds)) for kernel, seconds in measured.items()}
    fastest = min(means, key=means.__getitem__)
    own = [kernel for kernel in means if kernel.is_own]
    # The first of ours, not the fastest: which one it is must not hang on what was measured on one machine.
    if prefers_own and own and means[own[0]] <= MAX_COST * means[fastest]:
        fastest = own[0]
    return Selection(fastest, measured)
