"""What a step takes beside the bytes and operations of a data sheet: each figure says where it is from. Numbers only.

No GPU has run this code, so what is of GPUs is assumed. What is of lanes, Python and CPU kernels was measured on the
two CPU cores of docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planning.gpus import GpuType
from cluster.planning.roofline import Link


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that plans are made of."""

    value: float
    what: str
    measured: bool
    source: str

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


LANE_DISPATCH_S = Figure(95e-6, "95 µs for a layer's dispatch over lanes", True, "One dispatch, 1 to 8 groups")
LANE_GROUP_S = Figure(78e-6, "78 µs more for each group that is asked", True, "One dispatch, 1 to 8 groups")
LANE_BANDWIDTH = Figure(1.5e9, "1.5 GB/s over a lane", True, "One dispatch, 64 and 512 rows")
LAYER_S = Figure(
    0.31e-3, "0.31 ms of Python and calls for a layer", True, "Where a step's time goes, next to no weights"
)

GPU_EFFICIENCY = Figure(0.7, "kernels reach 0.7 of the data sheet's bandwidth and speed", False, "no GPU was timed")
GPU_LAYER_S = Figure(
    LAYER_S.value, "a GPU's layer takes as much Python and calls as a CPU's", False, "no GPU was timed"
)
COPY_S = Figure(10e-6, "10 µs for a copy between GPU and host", False, "no GPU was timed")
COPY_BANDWIDTH = Figure(20e9, "20 GB/s for such copies", False, "PCIe 4.0 x16 has 32 in each direction")

LANES = Link(LANE_BANDWIDTH.value, LANE_DISPATCH_S.value, LANE_GROUP_S.value)
OF_LANES = (LANE_DISPATCH_S, LANE_GROUP_S, LANE_BANDWIDTH)
OF_GPUS = (GPU_EFFICIENCY, GPU_LAYER_S)
OF_COPIES = (COPY_S, COPY_BANDWIDTH)


def reached(gpu: GpuType) -> GpuType:
    """What kernels make of it."""
    return replace(gpu, bandwidth=gpu.bandwidth * GPU_EFFICIENCY.value, flops=gpu.flops * GPU_EFFICIENCY.value)


def between_devices(link: Link, gpus: int) -> Link:
    """The same where rows lie on GPUs at so many of its two ends: they are copied to the host and back again."""
    return Link(
        1 / (1 / link.bandwidth + gpus / COPY_BANDWIDTH.value),
        link.dispatch_s + 2 * gpus * COPY_S.value,
        link.group_s,
    )
