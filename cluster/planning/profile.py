"""What `manta doctor --profile` measured on a machine, in place of what plans assume. Reads JSON; measures nothing.

    {"manta_profile": 1, "gpu": {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85e9}, "figures": {"copy_s": 8e-6, …}}

Seconds and bytes a second. A figure that is missing stays what it was. A card's bandwidth and speed are shares of its
data sheet, so that they can be used for other types; a card without one is planned for as it was measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.planning.costs import ASSUMED, Costs, Figure
from cluster.planning.gpus import GPUS, GpuType

VERSION = 1
# Of a profile, and what a plan says of each.
FIGURES = {
    "lane_dispatch_s": "{us:.0f} µs for a layer's dispatch over lanes",
    "lane_group_s": "{us:.0f} µs more for each group that is asked",
    "lane_bandwidth": "{gb:.1f} GB/s over a lane",
    "memory_bandwidth": "{gb:.1f} GB/s through memory that a coordinator shares with shards on its machine's CPUs",
    "cpu_bandwidth": "{gb:.0f} GB/s from the CPU's memory",
    "gpu_bandwidth": "{gb:.0f} GB/s from the GPU's memory",
    "gpu_flops": "{tera:.0f} TFLOP/s of bf16",
    "launch_s": "{us:.1f} µs of the host for a launch",
    "layer_s": "{us:.0f} µs of Python and launches for a layer",
    "captured_s": "{us:.0f} µs around a step whose layers are one CUDA graph",
    "copy_s": "{us:.1f} µs for a copy between GPU and host",
    "copy_bandwidth": "{gb:.1f} GB/s for such copies",
}


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one machine."""

    source: str  # the file
    gpu: GpuType | None  # as its data sheet has it; as it was measured, where there is none
    figures: Mapping[str, float]

    def measured(self, name: str) -> Figure | None:
        """One of FIGURES, if it was."""
        value = self.figures.get(name)
        if value is None:
            return None
        return Figure(value, FIGURES[name].format(us=value * 1e6, gb=value / 1e9, tera=value / 1e12), True, self.source)

    def costs(self) -> Costs:
        """What plans are made of, measured as far as it was."""
        costs = ASSUMED
        for field, name in (
            ("lane_dispatch", "lane_dispatch_s"),
            ("lane_group", "lane_group_s"),
            ("lane_bandwidth", "lane_bandwidth"),
            ("memory_bandwidth", "memory_bandwidth"),
            ("launch", "launch_s"),
            ("captured", "captured_s"),
            ("copy", "copy_s"),
        ):
            costs = _with(costs, field, self.measured(name))
        if layer := self.measured("layer_s"):  # of the whole: what is launched is in it
            costs = replace(costs, python=layer, launches=Figure(0, "", True, self.source))
        if self.gpu is not None:
            costs = _with(costs, "gpu_bandwidth", self._share("gpu_bandwidth", self.gpu.bandwidth))
            costs = _with(costs, "gpu_speed", self._share("gpu_flops", self.gpu.flops))
            costs = _with(costs, "copy_share", self._share("copy_bandwidth", self.gpu.host_bandwidth))
        return costs

    def _share(self, name: str, of_sheet: float) -> Figure | None:
        """A measured figure as a share of the data sheet's."""
        figure = self.measured(name)
        return None if figure is None else replace(figure, value=figure.value / of_sheet)


def read_profile(file: Path) -> Profile:
    """Raises ConfigError."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--profile: {file} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("manta_profile") != VERSION:
        raise ConfigError(f"--profile: {file} is no profile of version {VERSION}: manta doctor --profile writes one")
    figures = document.get("figures")
    if not isinstance(figures, dict):
        raise ConfigError(f"--profile: {file}: figures: expected an object")
    for name, value in figures.items():
        if name not in FIGURES:
            raise ConfigError(f"--profile: {file}: figures.{name} is unknown; known are {', '.join(FIGURES)}")
        if not _is_positive(value):
            raise ConfigError(f"--profile: {file}: figures.{name}: expected a positive number")
    return Profile(str(file), _gpu(file, document.get("gpu"), figures), figures)


def _gpu(file: Path, gpu: Any, figures: Mapping[str, float]) -> GpuType | None:
    """The card of a profile. Raises ConfigError."""
    if gpu is None:
        return None
    if not (isinstance(gpu, dict) and isinstance(gpu.get("name"), str) and _is_positive(gpu.get("memory_bytes"))):
        raise ConfigError(f"--profile: {file}: gpu: expected name and memory_bytes")
    memory = int(gpu["memory_bytes"])
    if known := sheet_of(gpu["name"], memory):
        return known
    if "gpu_bandwidth" not in figures or "gpu_flops" not in figures:
        return None
    return GpuType(gpu["name"], memory, figures["gpu_bandwidth"], figures["gpu_flops"])


def sheet_of(name: str, memory_bytes: int) -> GpuType | None:
    """The type of a card by the driver's name for it: "NVIDIA A100-SXM4-80GB". A slice of one (MIG) is none."""
    words = set(re.split(r"[\s-]+", name.upper()))
    if "MIG" in words:
        return None
    alike = [gpu for known, gpu in GPUS.items() if known.split("-")[0] in words]
    return min(alike, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes), default=None)


def _with(costs: Costs, field: str, figure: Figure | None) -> Costs:
    if figure is None:
        return costs
    changes: dict[str, Any] = {field: figure}
    return replace(costs, **changes)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
