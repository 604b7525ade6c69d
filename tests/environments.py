"""Virtual environments of their own, for clients whose dependencies clash with ours."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTALL_TIMEOUT_S = 900


def make_environment(directory: Path, *requirements: str, with_ours: bool = False) -> Path:
    """The interpreter of a new environment that has `requirements`, with ours behind them where `with_ours`.

    Skips the test when pip cannot install them, an index out of reach for example.
    """
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    if with_ours:
        site_packages = next(directory.glob("lib/python*/site-packages"))
        (site_packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
    _pip(python, "install", *requirements)
    return python


@dataclass(frozen=True)
class Environment:
    """One that later runs find again."""

    python: Path
    sources: Path | None  # of one of its packages


def cached_environment(requirements: Path, sources_of: str | None = None) -> Environment:
    """The environment of a file of exact versions, made once and kept in the user's cache.

    With `sources_of`, a package among them, its source distribution lies beside it: tests are seldom in a wheel.
    """
    text = requirements.read_text()
    digest = hashlib.sha256(f"{sys.version}\n{sources_of}\n{text}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manta-tests"
    directory = cache / f"{requirements.parent.name}-{digest}"
    complete = directory / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(directory, ignore_errors=True)
            python = make_environment(directory, "--requirement", str(requirements))
            if sources_of is not None:
                _add_sources(python, directory, _pinned(text, sources_of))
            complete.touch()
    sources = None if sources_of is None else next(directory.glob(f"sources/{sources_of}-*/"))
    return Environment(directory / "bin" / "python", sources)


def _pinned(requirements: str, package: str) -> str:
    """`package==version`"""
    return next(line for line in requirements.splitlines() if line.startswith(f"{package}=="))


def _add_sources(python: Path, directory: Path, requirement: str) -> None:
    package = requirement.partition("==")[0]
    _pip(python, "download", "--no-deps", "--no-binary", package, "--dest", str(directory), requirement)
    [archive] = directory.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(directory / "sources", filter="data")


def _pip(python: Path, command: str, *arguments: str) -> None:
    line = [python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments]
    pip = subprocess.run(line, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    if pip.returncode != 0:
        last = pip.stderr.strip().splitlines()[-1:] or ["no message"]
        pytest.skip(f"pip cannot {command} {', '.join(arguments)}: {last[0]}")


def run_in(
    python: Path, *arguments: str | Path, timeout_s: float = 300, environment: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command of that environment, which must succeed; `environment` is added to ours."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(environment or {})
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, env=variables
    )
    assert done.returncode == 0, f"{sys.argv}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
