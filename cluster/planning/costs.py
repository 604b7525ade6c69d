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

KERNELS = Figure(
    2.76, "one row is multiplied 1.77 times as fast with int8 and 2.76 with int4 as with bf16", True, "Matmuls on a CPU"
)
CORE_FLOPS = Figure(228e9, "228 GFLOP/s a core with many rows", True, "Matmuls on a CPU, `dot`, one thread")
CPU_BANDWIDTH = Figure(40e9, "40 GB/s from a CPU's memory", False, "give --ram-bandwidth")
CPU_CORES = Figure(8, "8 cores", False, "give --cores")

# How much faster than bf16 the kernels of 8 and 4 bits in groups of 128 are: by rows of an expert, on two threads.
_KERNEL_SPEED = {8: {1: 1.77, 4: 1.47, 16: 0.99}, 4: {1: 2.76, 4: 1.79, 16: 1.01}}

LANES = Link(LANE_BANDWIDTH.value, LANE_DISPATCH_S.value, LANE_GROUP_S.value)
OF_LANES = (LANE_DISPATCH_S, LANE_GROUP_S, LANE_BANDWIDTH)
OF_GPUS = (GPU_EFFICIENCY, GPU_LAYER_S)
OF_COPIES = (COPY_S, COPY_BANDWIDTH)
OF_CPUS = (KERNELS, CORE_FLOPS)


def kernel_speed(bits: int, rows: float) -> float:
    """Of small numbers on a CPU, 1 being that of bf16, where an expert has so many rows."""
    measured = _KERNEL_SPEED.get(bits)
    if measured is None:
        return 1.0
    return measured[max((number for number in measured if number <= rows), default=1)]


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
