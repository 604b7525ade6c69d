"""Virtual environments of their own, for clients whose dependencies clash with ours."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
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
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    pip = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    if pip.returncode != 0:
        last = pip.stderr.strip().splitlines()[-1:] or ["no message"]
        pytest.skip(f"pip cannot install {', '.join(requirements)}: {last[0]}")
    return python


def run_in(python: Path, *arguments: str | Path, timeout_s: float = 300) -> str:
    """Standard output of a command of that environment, which must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )
    assert done.returncode == 0, f"{sys.argv}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
