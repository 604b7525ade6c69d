"""What a step takes beside the bytes and operations of a data sheet: each figure says where it is from. Numbers only.

What is of GPUs was measured on one H100, what is of lanes, Python and CPU kernels on two CPU cores: docs/benchmarks.md
has both. A profile of the user's own machine (profile.py) takes the place of either.
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
MEMORY_BANDWIDTH = Figure(
    3.9e9, "3.9 GB/s through memory that a coordinator shares with shards on its machine's CPUs", True,
    "One dispatch, 512 rows through shared memory",
)  # fmt: skip
LAYER_S = Figure(
    0.31e-3, "0.31 ms of Python and calls for a layer", True, "Where a step's time goes, next to no weights"
)

ON_A_GPU = "On a GPU"
GPU_BANDWIDTH = Figure(0.90, "a GPU's memory is read at 0.9 of the data sheet's bandwidth", True, ON_A_GPU)
GPU_SPEED = Figure(0.77, "matrices are multiplied at 0.77 of the data sheet's speed", True, ON_A_GPU)
STEP_SHARE = Figure(0.82, "a step reaches 0.82 of the bandwidth", True, ON_A_GPU)
PROMPT_SHARE = Figure(0.57, "a prompt reaches 0.57 of the speed", True, ON_A_GPU)
GPU_PYTHON_S = Figure(0.73e-3, "0.73 ms of Python for a layer", True, ON_A_GPU)
LAUNCHES = Figure(20, "20 launches in a layer", False, "the most by a count without a GPU: docs/gpu.md")
LAUNCH_S = Figure(10e-6, "10 µs of the host for a launch", True, ON_A_GPU)
STEP_S = Figure(1.7e-3, "1.7 ms of Python around a step whose layers are one CUDA graph", True, ON_A_GPU)
COPY_S = Figure(17e-6, "17 µs for a copy between GPU and host", True, ON_A_GPU)
COPY_SHARE = Figure(0.85, "copies between GPU and host reach 0.85 of its PCIe link", True, ON_A_GPU)
HOP_S = Figure(
    10e-6, "10 µs for each of the 2 exchanges of tensor parallelism in a layer", False, "no two GPUs were timed"
)

KERNELS = Figure(
    2.76, "one row is multiplied 1.77 times as fast with int8 and 2.76 with int4 as with bf16", True, "Matmuls on a CPU"
)
CORE_FLOPS = Figure(228e9, "228 GFLOP/s a core with many rows", True, "Matmuls on a CPU, `dot`, one thread")
CPU_BANDWIDTH = Figure(40e9, "40 GB/s from a CPU's memory", False, "give --ram-bandwidth")
CPU_CORES = Figure(8, "8 cores", False, "give --cores")

# How much faster than bf16 the kernels of 8 and 4 bits in groups of 128 are: by rows of an expert, on two threads.
_KERNEL_SPEED = {8: {1: 1.77, 4: 1.47, 16: 0.99}, 4: {1: 2.76, 4: 1.79, 16: 1.01}}

OF_CPUS = (KERNELS, CORE_FLOPS)


def kernel_speed(bits: int, rows: float) -> float:
    """Of small numbers on a CPU, 1 being that of bf16, where an expert has so many rows."""
    measured = _KERNEL_SPEED.get(bits)
    if measured is None:
        return 1.0
    return measured[max((number for number in measured if number <= rows), default=1)]


@dataclass(frozen=True, slots=True)
class Costs:
    """What GPUs, lanes and the host between them take, as far as nobody has measured it elsewhere."""

    lane_dispatch: Figure = LANE_DISPATCH_S
    lane_group: Figure = LANE_GROUP_S
    lane_bandwidth: Figure = LANE_BANDWIDTH
    memory_bandwidth: Figure = MEMORY_BANDWIDTH
    gpu_bandwidth: Figure = GPU_BANDWIDTH  # of the data sheet's
    gpu_speed: Figure = GPU_SPEED  # the same
    step_share: Figure = STEP_SHARE  # of the bandwidth that a card has
    prompt_share: Figure = PROMPT_SHARE  # of its speed
    python: Figure = GPU_PYTHON_S  # of a layer, without launches
    launches: Figure = LAUNCHES  # of a layer
    launch: Figure = LAUNCH_S
    captured: Figure = STEP_S  # the host's part of a step that is one CUDA graph
    copy: Figure = COPY_S
    copy_share: Figure = COPY_SHARE  # of the data sheet's
    hop: Figure = HOP_S

    @property
    def lanes(self) -> Link:
        """Between two processes, without copies to and from GPUs."""
        return Link(self.lane_bandwidth.value, self.lane_dispatch.value, self.lane_group.value)

    @property
    def layer_s(self) -> float:
        """Of the host, Python and launches."""
        return self.python.value + self.launches.value * self.launch.value

    @property
    def of_lanes(self) -> tuple[Figure, ...]:
        """What rows between processes cost, where nobody says otherwise."""
        return (self.lane_dispatch, self.lane_group, self.lane_bandwidth)

    @property
    def of_gpus(self) -> tuple[Figure, ...]:
        """What a step on a GPU costs beside its bytes and operations."""
        of_launches = (self.launches, self.launch) if self.launches.value else ()
        of_card = (self.gpu_bandwidth, self.step_share, self.gpu_speed, self.prompt_share)
        return (*of_card, self.python, *of_launches)

    @property
    def of_steps(self) -> tuple[Figure, ...]:
        """What a step costs beside that where all experts are local."""
        return (self.captured,)

    @property
    def of_copies(self) -> tuple[Figure, ...]:
        """What rows cost on their way from and to a GPU."""
        return (self.copy, self.copy_share)

    def reached(self, gpu: GpuType) -> GpuType:
        """What steps and prompts make of it."""
        return replace(
            gpu,
            bandwidth=gpu.bandwidth * self.gpu_bandwidth.value * self.step_share.value,
            flops=gpu.flops * self.gpu_speed.value * self.prompt_share.value,
        )

    def between_devices(self, link: Link, gpu: GpuType, gpus: int) -> Link:
        """The same where rows lie on GPUs at so many of its two ends: they are copied to the host and back again."""
        return Link(
            1 / (1 / link.bandwidth + gpus / (self.copy_share.value * gpu.host_bandwidth)),
            link.dispatch_s + 2 * gpus * self.copy.value,
            link.group_s,
        )

    def hops_s(self, gpu: GpuType, layers: int, row_bytes: float, gpus: int) -> float:
        """What tensor parallelism over so many GPUs sends in a step, two sums a layer, each twice through a ring."""
        if gpus == 1:
            return 0.0
        sent = 2 * (gpus - 1) / gpus * row_bytes / (self.copy_share.value * gpu.peer_bandwidth)
        return 2 * layers * (self.hop.value + sent)


ASSUMED = Costs()
LANES = ASSUMED.lanes
