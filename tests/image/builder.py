"""Builds the image `cpu` without a daemon: buildah, on a base that debootstrap makes of Debian's packages.

Only what the Dockerfile says is done: that the base is not Docker's `python:3.11-slim-bookworm`, and that pip looks for
packages where it looks for them here, is all that differs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
BASE, IMAGE = "localhost/python:test", "localhost/manta:test"
NEEDED = ("buildah", "debootstrap")
TIMEOUT_S = 3600
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class NotPossible(Exception):
    """What this machine lacks."""


class Builder:
    """A store of its own. Layers lie over each other where the kernel has that, else each is a whole copy."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        store, run = str(directory / "store"), str(directory / "run")
        driver = "overlay" if _has_overlay(directory) else "vfs"
        self._options = ["--storage-driver", driver, "--root", store, "--runroot", run]

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """For who starts it."""
        return ["buildah", *self._options, *arguments]

    def __call__(self, *arguments: str | Path) -> str:
        """Standard output."""
        command = self.command(*arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, f"buildah {arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def has(self, image: str) -> bool:
        """Whether it is there already."""
        command = self.command("inspect", "--type", "image", image)
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False).returncode == 0

    def config(self) -> dict[str, Any]:
        """Of the image, as Docker has it."""
        config: dict[str, Any] = json.loads(self("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        return config


def _has_overlay(directory: Path) -> bool:
    """Whether this user may mount such a file system there."""
    places = [directory / "overlay" / name for name in ("lower", "upper", "work", "merged")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    lower, upper, work, merged = places
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["umount", str(merged)], check=True)
    shutil.rmtree(directory / "overlay")
    return mounted


def build_base(builder: Builder, directory: Path) -> None:
    """Debian's Python, which finds packages as pip does here. Raises NotPossible where Debian is out of reach."""
    started = time.monotonic()
    root = directory / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), MIRROR]
    made = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if made.returncode != 0:
        raise NotPossible(f"debootstrap: {(made.stdout + made.stderr).strip().splitlines()[-1:]}")
    lines, _ = _pip_here()
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    (root / "etc" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    container = builder("from", "scratch").strip()
    builder("add", "--quiet", container, str(root), "/")
    builder("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)
    print(f"the base took {time.monotonic() - started:.0f} s")


def build_image(builder: Builder) -> None:
    """The target `cpu` of the Dockerfile, on that base."""
    started = time.monotonic()
    _, folders = _pip_here()
    # Who has wheels of their own has torch without CUDA among them, under PyPI's name.
    index = "https://pypi.org/simple" if folders else "https://download.pytorch.org/whl/cpu"
    arguments = [
        *("--isolation", "chroot", "--format", "docker", "--target", "cpu", "--tag", IMAGE, "--quiet"),
        *("--build-arg", f"PYTHON_IMAGE={BASE}"),
        *("--build-arg", f"TORCH_CPU_INDEX={os.environ.get('TORCH_CPU_INDEX', index)}"),
        *(f"--volume={folder}:{folder}:ro" for folder in folders),
    ]
    builder("build", *arguments, str(REPOSITORY))
    print(f"the image took {time.monotonic() - started:.0f} s")


def _pip_here() -> tuple[list[str], list[str]]:
    """Lines for a pip.conf that has pip look where it looks here, and the folders that it needs for that."""
    lines, folders = [f"cert = {CERTIFICATES}"], set()
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    for name, value in re.findall(r"^(?:global|:env:)\.(find-links|extra-index-url|index-url)='(.*)'$", listed, re.M):
        lines.append(f"{name} = {value}")
        folders |= {"/".join(part.split("/")[:3]) for part in re.findall(r"(?:^|file://|\s)(/\S+)", value)}
    return list(dict.fromkeys(lines)), sorted(folders)
