"""Times what plans are made of, on this machine, and writes it for `manta plan --profile`. Judges nothing.

Each figure is the median or the best of several, of a machine that has nothing else to do: say so where it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.bench.machine import read_bandwidth, this_machine
from cluster.commands.doctor.checks import Check, Finding, good
from cluster.commands.doctor.lanes import lane_figures
from cluster.commands.doctor.model import generate
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import ConfigError
from cluster.planning.profile import FIGURES, VERSION

CPU_READ_BYTES, GPU_READ_BYTES = 2**28, 2**32
COPY_BYTES = 2**26
SQUARE = 8192  # of matrices that are multiplied
LAUNCHES = 1000
ROW_BYTES = 8192  # of Mixtral, in bf16


class Profile:
    """What has been measured so far."""

    def __init__(self, device: torch.device | None) -> None:
        """`device`: a GPU, if there is one."""
        self.device = device
        self.figures: dict[str, float] = {}

    def checks(self) -> tuple[Check, ...]:
        """Each adds its figures to the profile."""
        general = (
            Check(
                "lanes",
                "What a layer's dispatch between processes costs.",
                lambda: self._add(lane_figures()),
            ),
            Check(
                "memory bandwidth",
                "Decoding on a CPU reads weights as fast as that at most.",
                lambda: self._add({"cpu_bandwidth": read_bandwidth("cpu", CPU_READ_BYTES)}),
            ),
        )
        if self.device is None:
            return general
        device = self.device
        return (
            *general,
            Check(
                f"bandwidth of {device}",
                "Decoding reads weights as fast as that at most.",
                lambda: self._add({"gpu_bandwidth": read_bandwidth(str(device), _that_fits(device, GPU_READ_BYTES))}),
            ),
            Check(
                f"speed of {device}",
                "Prompts are multiplied as fast as that at most.",
                lambda: self._add(_speed(device)),
            ),
            Check(
                f"launches on {device}", "What the host takes to start a kernel.", lambda: self._add(_launch(device))
            ),
            Check(
                f"copies to {device}",
                "Rows to experts elsewhere are copied to the host.",
                lambda: self._add(_copies(device)),
            ),
            Check(
                f"a layer on {device}",
                "A step of the embedded model, by its layers: next to no bytes, so Python and launches.",
                lambda: self._add(_layer(device)),
            ),
        )

    def _add(self, figures: dict[str, float]) -> Finding:
        self.figures |= figures
        return good(
            ", ".join(
                FIGURES[name].format(us=value * 1e6, gb=value / 1e9, tera=value / 1e12)
                for name, value in figures.items()
            )
        )

    def document(self) -> dict[str, Any]:
        """As the file has it."""
        gpu = None
        if self.device is not None:
            properties = torch.cuda.get_device_properties(self.device)
            gpu = {"name": properties.name, "memory_bytes": properties.total_memory}
        return {"manta_profile": VERSION, "machine": this_machine().to_json(), "gpu": gpu, "figures": self.figures}

    def write(self, file: Path) -> None:
        """Raises ConfigError."""
        try:
            file.write_text(json.dumps(self.document(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--profile: {file} cannot be written: {error.strerror}") from error


def _that_fits(device: torch.device, nbytes: int) -> int:
    """So many bytes, or half of what is free."""
    return min(nbytes, torch.cuda.mem_get_info(device)[0] // 2)


def _seconds(device: torch.device, work: Callable[[], object], *, rounds: int = 10) -> float:
    """Of work that is waited for: the median."""
    seconds = []
    for turn in range(2 + rounds):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def _speed(device: torch.device) -> dict[str, float]:
    one = torch.randn(SQUARE, SQUARE, device=device).to(torch.bfloat16)
    return {"gpu_flops": 2 * SQUARE**3 / _seconds(device, lambda: one @ one)}


def _launch(device: torch.device) -> dict[str, float]:
    """A thousand kernels that do nothing to speak of, and that nobody waits for in between."""
    number = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    return {"launch_s": _seconds(device, launches) / LAUNCHES}


def _copies(device: torch.device) -> dict[str, float]:
    """Of one row, and of many, from pinned memory and back."""
    row, many = (torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for nbytes in (ROW_BYTES, COPY_BYTES))
    row_there, many_there = row.to(device), many.to(device)

    def both(host: torch.Tensor, there: torch.Tensor) -> float:
        to = _seconds(device, lambda: there.copy_(host, non_blocking=True))
        back = _seconds(device, lambda: host.copy_(there, non_blocking=True))
        return max(to, back)

    return {"copy_s": both(row, row_there), "copy_bandwidth": COPY_BYTES / both(many, many_there)}


def _layer(device: torch.device) -> dict[str, float]:
    """Of steps that are launched one by one, and of those that are captured."""
    checkpoint = open_checkpoint(DEMO)

    def of_step(cuda_graphs: Literal["auto", "off"]) -> float:
        steps: list[float] = []
        for _ in range(2):  # the first compiles
            steps.clear()
            generate(
                checkpoint,
                device,
                torch.bfloat16,
                [[1, 5, 9]],
                observe_step=lambda seconds, _batch: steps.append(seconds),
                cuda_graphs=cuda_graphs,
            )
        return median(steps[2:])  # behind the prompt, and what captures

    return {"layer_s": of_step("off") / checkpoint.architecture.num_layers, "captured_s": of_step("auto")}
