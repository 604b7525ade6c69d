"""What `manta serve` has looked at before it starts: its GPUs, in the short form, once for each driver, torch and card.

In a process of its own, which leaves nothing on the card, and whose crash is a finding. That all was well is remembered
among the user's caches; what was not is looked at again at the next start. Nothing here keeps a server from starting,
or takes time where there is no GPU.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.commands.doctor import NVIDIA
from cluster.commands.doctor.checks import Status

SHORT_FORM = (sys.executable, "-P", "-m", "cluster.cli", "doctor", "--short", "--json")
TIMEOUT_S = 300.0  # kernels are compiled
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_PACKAGES = ("manta-serve", "torch", "triton")


def look_at_gpus(console: Console) -> None:
    """Say where they stand, in one line. Nothing is said where there are none."""
    if not NVIDIA.exists():
        return
    remembered = _remembered()
    if remembered is not None and os.path.exists(remembered):  # Path.exists raises where it may not look
        return
    console.print("Looking at the GPU (manta doctor --short, once for each driver, torch and card) …", highlight=False)
    document = _short_form()
    bad = [one for one in document["checks"] if one["status"] == Status.FAILED]
    if bad:
        first = bad[0]
        others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        console.print(
            f"Warning: {first['name']}: {first['found']}{others}. `manta doctor` says more.",
            style="yellow", markup=False, highlight=False,
        )  # fmt: skip
        return
    console.print(f"The GPU is well: {len(document['checks'])} checks.", highlight=False)
    if remembered is not None:
        with suppress(OSError):
            remembered.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remembered.write_text(json.dumps(document))


def _short_form() -> dict[str, Any]:
    """What it says; what keeps it from saying anything is one more failure."""
    try:
        done = subprocess.run(
            SHORT_FORM, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return _silent(f"{type(error).__name__} in {TIMEOUT_S:g} s")
    lines = done.stdout.splitlines()
    try:
        document: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        how = f"exit code {done.returncode}" if done.returncode >= 0 else signal.Signals(-done.returncode).name
        return _silent(f"it ended with {how}")
    return document


def _silent(found: str) -> dict[str, Any]:
    return {"checks": [{"name": "manta doctor", "status": Status.FAILED, "found": found}]}


def _remembered() -> Path | None:
    """The file that says that this driver, torch and these cards were well; None: there is no place for it."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # to be ignored, says its standard
        try:
            home = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
    versions = []
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(package))
    key = hashlib.sha256(repr((_cards(), versions)).encode()).hexdigest()[:16]
    return home / "manta" / f"gpus-are-well-{key}.json"


def _cards() -> str:
    """Driver and cards, by nvidia-smi, or the driver's own file."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                query, capture_output=True, text=True, errors="replace", timeout=20, check=True
            ).stdout
    with suppress(OSError):
        return DRIVER_VERSION.read_text()
    return ""
