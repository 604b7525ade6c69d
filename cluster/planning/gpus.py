"""GPU types by the names that Ray gives them: memory, bandwidth and speed, from NVIDIA's data sheets. Numbers only.

Bandwidth is that of the memory, speed that of bf16 matrices without sparsity; the data sheets give twice as much where
they count sparse ones. Links are of one direction, half of what the sheets tell of both: PCIe 4.0 or 5.0 with 16 lanes,
and NVLink. A type without all of these is known by its memory alone: `manta plan` does not plan for it.

    A10G           its data sheet; 125 is the A10's speed    A100        nvidia-a100-datasheet, SXM
    L4, L40S       their product briefs                      H100, H200  h100-datasheet, h200-datasheet, SXM
    B200           dgx-b200-datasheet, an eighth of it

A10 and A10G side by side: https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GpuType:
    """One GPU."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes a second
    flops: float  # bf16, a second
    host_bandwidth: float = 32e9  # bytes a second in each direction: PCIe
    nvlink_bandwidth: float = 0.0  # the same to its neighbours; 0: it has none

    @property
    def peer_bandwidth(self) -> float:
        """To a neighbour, the best way there is."""
        return self.nvlink_bandwidth or self.host_bandwidth


# name: (10^9 bytes, 10^9 bytes a second, 10^12 operations a second, 10^9 bytes a second by PCIe, by NVLink)
_PLANNED = {
    "A10G": (24, 600, 70, 32, 0),
    "A100-40G": (40, 1555, 312, 32, 300),
    "A100-80G": (80, 2039, 312, 32, 300),
    "H100": (80, 3350, 989, 64, 450),
    "H200": (141, 4800, 989, 64, 450),
    "L4": (24, 300, 121, 32, 0),
    "L40S": (48, 864, 362, 32, 0),
    "B200": (180, 8000, 2250, 64, 900),
}

# 10^9 bytes, of those that Ray knows as well.
_MEMORY_ONLY = {
    "A100": 40, "B300": 270, "GB200": 180, "GB300": 270, "H20": 96, "RTX-PRO-6000": 96, "T4": 16, "V100": 16,
}  # fmt: skip
# Of compute capability before 8.0: their tensor cores, if any, multiply float16 alone.
_WITHOUT_BF16 = {"K80", "P100", "P4", "T4", "V100"}
_UNKNOWN_GPU_BYTES = 2**50  # taken to be large enough: the process itself will say when it is not

GPUS = {
    name: GpuType(name, gigabytes * 10**9, bandwidth * 1e9, flops * 1e12, pcie * 1e9, nvlink * 1e9)
    for name, (gigabytes, bandwidth, flops, pcie, nvlink) in _PLANNED.items()
}


def gpu_type(name: str) -> GpuType:
    """By its name, in whatever case. Raises ConfigError with the names that are known."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    if lacks_bf16(name.upper()):
        raise ConfigError(
            f"{name.upper()}: there is nothing to plan for, as it has no bfloat16; models run there in engine.dtype: "
            "float32, 4 bytes a weight, and launch by launch. Plans are made for " + ", ".join(GPUS)
        )
    raise ConfigError(f"there is no GPU type {name!r}; known are {', '.join(GPUS)}")


def lacks_bf16(accelerator_type: str) -> bool:
    """Whether it is known to: models run there in float32, by torch's operations."""
    return accelerator_type in _WITHOUT_BF16


def gpu_memory_bytes(accelerator_type: str) -> int:
    """Of one GPU of that type; more than any has when the type is unknown."""
    if accelerator_type in GPUS:
        return GPUS[accelerator_type].memory_bytes
    gigabytes = _MEMORY_ONLY.get(accelerator_type)
    return _UNKNOWN_GPU_BYTES if gigabytes is None else gigabytes * 10**9
