"""Checks of the cards themselves: driver, kind, memory, neighbours, slices, Triton. Asks torch; loads no model."""

from __future__ import annotations

import importlib.metadata

import torch

from cluster.commands.doctor import NVIDIA
from cluster.commands.doctor.checks import Check, Finding, failed, good, not_applicable
from cluster.planning.placement import gib
from experts_service.kernels.gpu.launch import can_compile

LEAST_CAPABILITY = (8, 0)  # the first with bf16
MOST_TAKEN = 0.05  # of a card's memory, by others, CUDA's own contexts among them
_NUMBERS = 1000  # that Triton's first kernel doubles


def driver() -> Finding:
    """Whether torch reaches a card, and by which CUDA."""
    if not torch.cuda.is_available():
        if not NVIDIA.exists():
            return not_applicable(f"there is no NVIDIA driver here ({NVIDIA})")
        if torch.version.cuda is None:
            return failed(
                f"there is a driver, and torch {torch.__version__} is made for CPUs",
                "install torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu128",
            )
        return failed(
            f"there is a driver, and torch for CUDA {torch.version.cuda} reaches no card",
            "nvidia-smi says whether the driver does; one older than that CUDA has to be renewed",
        )
    return good(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, torch for CUDA {torch.version.cuda}")


def capability() -> Finding:
    """Of each card."""
    found, old = [], []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        is_old = (major, minor) < LEAST_CAPABILITY
        lacks = ", which has no bf16" if is_old else ""
        found.append(f"{index}: {torch.cuda.get_device_name(index)}, {major}.{minor}{lacks}")
        if is_old:
            old.append(str(index))
    if old:
        return failed(
            "; ".join(found),
            f"leave out {', '.join(old)} (CUDA_VISIBLE_DEVICES), or serve with engine.dtype: float32, which takes 4 "
            "bytes a weight and runs launch by launch; bf16 is refused before 8.0",
        )
    return good("; ".join(found))


def memory() -> Finding:
    """Of each card, and whether somebody else has some of it."""
    found, taken = [], []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{index}: {gib(free)} of {gib(total)} are free")
        if total - free > MOST_TAKEN * total + torch.cuda.memory_reserved(index):
            taken.append(str(index))
    if taken:
        return failed(
            "; ".join(found),
            f"nvidia-smi says whose processes are on {', '.join(taken)}: Manta counts on nine tenths of a card",
        )
    return good("; ".join(found))


def peers() -> Finding:
    """Which cards read each other's memory."""
    number = torch.cuda.device_count()
    if number < 2:
        return not_applicable("there is one card")
    rows = [
        f"{one} → {', '.join(str(other) for other in range(number) if _reaches(one, other)) or 'none'}"
        for one in range(number)
    ]
    return good("; ".join(rows))


def _reaches(one: int, other: int) -> bool:
    return one != other and torch.cuda.can_device_access_peer(one, other)


def slices() -> Finding:
    """Whether a card is a slice of one (MIG)."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = [f"{index}: {name}" for index, name in enumerate(names) if " MIG " in f" {name} "]
    if not found:
        return not_applicable("these are whole cards")
    return good("; ".join(found) + ": memory and bandwidth are the slice's, and slices reach each other by the host")


def compiles(device: torch.device) -> Finding:
    """A kernel of Triton's."""
    if not can_compile():
        return failed(
            "Triton finds no C compiler, or is not there", "apt-get install gcc libc6-dev, or name one in $CC"
        )
    from cluster.commands.doctor.triton_probe import double

    numbers = torch.arange(_NUMBERS, device=device)
    double(numbers)
    if numbers.tolist() != list(range(0, 2 * _NUMBERS, 2)):
        return failed("a kernel was run, and computed something else", "install torch and triton of one release again")
    return good(f"triton {importlib.metadata.version('triton')} compiles and starts kernels")


DRIVER = Check("GPU driver", "Models are computed on GPUs through it.", driver)


def checks(device: torch.device) -> tuple[Check, ...]:
    """Where there is a card that torch reaches."""
    return (
        Check("capability", "Cards before 8.0 (Ampere) have no bf16.", capability),
        Check("GPU memory", "Weights, keys and values lie there, budgeted by the card's total.", memory),
        Check("peers", "Manta sends rows through the host; what reads its neighbour is told for planning.", peers),
        Check("slices", "A slice of a card (MIG) is a small card of its own.", slices),
        Check("Triton", "Kernels for GPUs are compiled by it when they are first started.", lambda: compiles(device)),
    )
