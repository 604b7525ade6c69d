"""Writes the locks beside it: every package of the image, its version, and the SHA-256 of its file on PyPI.

    python requirements/lock.py

Asks pip, and PyPI alone, what an installation on this machine would bring: run it with Python 3.11 on linux/amd64.
Versions are those of constraints.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INDEX = "https://pypi.org/simple"
BUILD = "setuptools"  # of pyproject.toml's build-system; a wheel is made without the network
OF_TORCH = ("torch", "nvidia-", "cuda-", "triton")  # what only the image with CUDA has from PyPI

COMMON_HEADER = "# Of both images. Made by requirements/lock.py.\n"
CUDA_HEADER = "# torch, Triton and CUDA's libraries, from PyPI. Made by requirements/lock.py.\n"
BUILD_HEADER = "# What makes our own wheel. Made by requirements/lock.py.\n"


def main() -> None:
    """Resolve twice, write three files."""
    constraints = ["--constraint", str(HERE.parent / "constraints.txt")]
    packages = _resolve([f"{HERE.parent}[otel]", *constraints])
    packages.pop("manta-serve")
    build = _resolve([_build_requirement(), "wheel"])
    cuda = {name: line for name, line in packages.items() if name.startswith(OF_TORCH)}
    common = {name: line for name, line in packages.items() if name not in cuda and name not in build}
    _write("common.txt", COMMON_HEADER, common)
    _write("torch-cuda.txt", CUDA_HEADER, cuda)
    _write("build.txt", BUILD_HEADER, build)


def _resolve(arguments: list[str]) -> dict[str, str]:
    """A line for each package that pip would install: `name==version --hash=sha256:…`."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    environment["PIP_CONFIG_FILE"] = os.devnull  # no index, and no files, but PyPI's
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--index-url", INDEX, "--report", str(report), *arguments]
        subprocess.run(command, env=environment, check=True)
        installs = json.loads(report.read_text())["install"]
    return {_name(one): _line(one) for one in sorted(installs, key=_name)}


def _name(install: dict[str, Any]) -> str:
    return str(install["metadata"]["name"]).lower().replace("_", "-").replace(".", "-")


def _line(install: dict[str, Any]) -> str:
    digest = install["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    return f"{_name(install)}=={install['metadata']['version']} --hash=sha256:{digest}"


def _build_requirement() -> str:
    import tomllib

    requires = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["build-system"]["requires"]
    return next(str(one) for one in requires if one.startswith(BUILD))


def _write(name: str, header: str, lines: dict[str, str]) -> None:
    (HERE / name).write_text(header + "".join(f"{line}\n" for line in lines.values()))
    print(f"{name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
