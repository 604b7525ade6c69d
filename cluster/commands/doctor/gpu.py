"""Checks of the cards themselves: driver, kind, memory, neighbours, slices, Triton. Asks torch; loads no model."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from cluster.commands.doctor import NVIDIA
from cluster.commands.doctor.checks import Check, Finding, failed, good, not_applicable, told
from cluster.planning.placement import gib
from experts_service.device import pin, wait_for_queue
from experts_service.device_memory import NotShared
from experts_service.kernels.gpu.launch import can_compile
from experts_service.wire.device_slots import DeviceSlots
from experts_service.wire.shared_memory import create

LEAST_CAPABILITY = (8, 0)  # the first with bf16
MOST_TAKEN = 0.05  # of a card's memory, by others, CUDA's own contexts among them
_NUMBERS = 1000  # that Triton's first kernel doubles
_HIDDEN, _ROWS = 4096, 16  # of rows in bf16 that are shared


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
            f"there is a driver, and torch for CUDA {torch.version.cuda} reaches no card: {_why()}",
            "nvidia-smi says whether the driver does; one older than that CUDA has to be renewed, or torch for "
            "an older CUDA installed",
        )
    return good(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, torch for CUDA {torch.version.cuda}")


def _why() -> str:
    """What torch says of it: that the driver is too old, that no card is visible."""
    try:
        torch.cuda.init()
    except Exception as error:
        return told(error)
    return "it does not say why"


def capability() -> Finding:
    """Of each card, and whether torch was built for it."""
    found, old, unknown = [], [], []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        is_old = (major, minor) < LEAST_CAPABILITY
        lacks = ", which has no bf16" if is_old else ""
        found.append(f"{index}: {torch.cuda.get_device_name(index)}, {major}.{minor}{lacks}")
        if is_old:
            old.append(str(index))
        if not _is_built_for(major, minor):
            unknown.append(f"{major}.{minor}")
    if unknown:
        return failed(
            "; ".join(found),
            f"this torch has no kernels for {', '.join(unknown)} (it has {', '.join(torch.cuda.get_arch_list())}), so "
            "the first request would fail: install one that has",
        )
    if old:
        return failed(
            "; ".join(found),
            f"leave out {', '.join(old)} (CUDA_VISIBLE_DEVICES), or serve with engine.dtype: float32, which takes 4 "
            "bytes a weight and runs launch by launch; bf16 is refused before 8.0",
        )
    return good("; ".join(found))


def _is_built_for(major: int, minor: int) -> bool:
    """Whether torch has machine code for that generation, or code that the driver translates (compute_…)."""
    for kind, generation, number in re.findall(r"(sm|compute)_(\d+?)(\d)(?!\d)", " ".join(torch.cuda.get_arch_list())):
        built = int(generation), int(number)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not torch.cuda.get_arch_list()


def modes() -> Finding:
    """Whether several processes may use a card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return not_applicable("there is no nvidia-smi to ask")
    query = [tool, "--query-gpu=index,compute_mode", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if others := [line.split(",")[0] for line in lines if not line.endswith(("Default", "]"))]:  # [N/A]
        return failed(
            "; ".join(lines),
            f"nvidia-smi -c DEFAULT -i {','.join(others)}: coordinators and shards that share a card could not start",
        )
    return good("; ".join(lines) or "it lists no card")


def computes(devices: list[torch.device]) -> Finding:
    """A product on each card, which it and the host have to have right."""
    wrong = []
    for device in devices:
        numbers = torch.arange(64.0).view(8, 8)
        if not torch.equal((numbers.to(device) @ numbers.to(device)).cpu(), numbers @ numbers):
            wrong.append(str(device))
    if wrong:
        return failed(f"a product on {', '.join(wrong)} is not the CPU's", "leave that card out (CUDA_VISIBLE_DEVICES)")
    return good(", ".join(map(str, devices)))


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


def shared_rows(device: torch.device) -> Finding:
    """Whether rows and answers reach the card through memory that a coordinator and a shard both map."""
    try:
        shared, descriptor = create(2 * _HIDDEN)
    except OSError as error:
        return good(f"rows are sent, which is slower: there is no memory to share: {told(error)}")
    os.close(descriptor)
    started = time.perf_counter()
    if not shared.pin(pin):
        return good("rows are sent, which is slower: the driver cannot read and write memory that two processes map")
    pinned_s = time.perf_counter() - started
    rows, answers = (half.view(torch.bfloat16)[: _ROWS * _HIDDEN] for half in (shared.requests, shared.answers))
    for number in (1.0, 2.0):  # the first is not measured
        rows.fill_(number)
        started = time.perf_counter()
        there = rows.to(device, non_blocking=True)
        answers.copy_(there + 1, non_blocking=True)
        wait_for_queue(device)
        took_s = time.perf_counter() - started
        if not bool((answers == number + 1).all()):
            return failed("rows came back as others", "experts.transport: lane; and please report it")
    size = shared.requests.nbytes * 2 >> 20
    there_and_back = f"{_ROWS} rows there and back in {1e6 * took_s:.0f} µs"
    on_card = _on_card(shared.answers, device)
    return good(f"{size} MiB pinned in {1e3 * pinned_s:.1f} ms; {there_and_back}; {on_card}")


def _on_card(answers: torch.Tensor, device: torch.device) -> str:
    """Whether rows between GPUs lie in memory of the shard's: made, exported, mapped again, and read and written."""
    try:
        _made, descriptor = DeviceSlots.create(answers, device)
        try:
            DeviceSlots.open(descriptor, answers, device)
        finally:
            os.close(descriptor)
    except NotShared as error:
        return f"between GPUs they lie there, as the card's own memory is not shared: {error}"
    return "between GPUs they lie in the card's own memory"


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
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return failed(
            "Triton's first kernel needs Python's headers", "apt-get install python3-dev, or Python's own image"
        )
    import triton

    cache = Path(triton.knobs.cache.dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        return failed(
            f"Triton keeps compiled kernels in {cache}, which cannot be written: {told(error)}",
            "make it writable, or name another directory in $TRITON_CACHE_DIR; without one no process starts",
        )
    from cluster.commands.doctor.triton_probe import double

    numbers = torch.arange(_NUMBERS, device=device)
    double(numbers)
    if numbers.tolist() != list(range(0, 2 * _NUMBERS, 2)):
        return failed("a kernel was run, and computed something else", "install torch and triton of one release again")
    return good(f"triton {importlib.metadata.version('triton')} compiles and starts kernels")


def _all() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


DRIVER = Check("GPU driver", "Models are computed on GPUs through it.", driver)


def checks(device: torch.device) -> tuple[Check, ...]:
    """Where there is a card that torch reaches."""
    return (
        Check("capability", "Cards before 8.0 (Ampere) have no bf16.", capability),
        Check(
            "GPUs compute", "Each card multiplies; what follows looks at the first in depth.", lambda: computes(_all())
        ),
        Check("compute mode", "Processes that share a card need the mode Default.", modes),
        Check("GPU memory", "Weights, keys and values lie there, budgeted by the card's total.", memory),
        Check("peers", "Rows between cards that read each other need not come to the host.", peers),
        Check(
            "shared rows",
            "A coordinator and shards on GPUs of one machine exchange rows by memory that both map.",
            lambda: shared_rows(device),
        ),
        Check("slices", "A slice of a card (MIG) is a small card of its own.", slices),
        Check("Triton", "Kernels for GPUs are compiled by it when they are first started.", lambda: compiles(device)),
    )
