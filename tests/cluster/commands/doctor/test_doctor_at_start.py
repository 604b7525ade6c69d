"""`manta serve` has its GPUs looked at once, says how they are, and starts whatever is found."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.commands.doctor import at_start


class Start:
    """A machine with a driver, and a `manta doctor` that says what it is told to, and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self._monkeypatch = monkeypatch
        self._asked = directory / "asked"
        self._smi = directory / "nvidia-smi"
        (directory / "nvidiactl").touch()
        monkeypatch.setattr(at_start, "NVIDIA", directory / "nvidiactl")
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        monkeypatch.setenv("PATH", str(directory), prepend=":")
        self.driver("570.1")

    def driver(self, version: str) -> None:
        self._smi.write_text(f"#!/bin/sh\necho GPU-1, NVIDIA L4, {version}\n")
        self._smi.chmod(0o755)

    def doctor(self, program: str) -> None:
        text = f"open({str(self._asked)!r}, 'a').write('.')\n{program}"
        self._monkeypatch.setattr(at_start, "SHORT_FORM", (sys.executable, "-S", "-c", text))

    def finds(self, **statuses: str) -> None:
        checks = [{"name": name, "status": status, "found": f"[{name}]"} for name, status in statuses.items()]
        self.doctor(f"print({json.dumps({'checks': checks})!r})")

    def look(self) -> str:
        out = io.StringIO()
        at_start.look_at_gpus(Console(file=out, width=200))
        return out.getvalue()

    @property
    def times_asked(self) -> int:
        return len(self._asked.read_text()) if self._asked.exists() else 0


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    return Start(monkeypatch, tmp_path)


def test_cards_that_are_well_are_looked_at_once_for_each_driver(start: Start) -> None:
    start.finds(driver="good", slices="not applicable")
    assert "The GPU is well: 2 checks." in start.look()
    assert start.look() == ""
    assert start.times_asked == 1
    start.driver("580.0")
    assert "The GPU is well" in start.look()
    assert start.times_asked == 2


def test_what_is_wrong_is_one_warning_at_every_start(start: Start) -> None:
    start.finds(driver="good", Triton="failed", experts="failed")
    for _ in range(2):
        warning = start.look().splitlines()[-1]
        assert warning == "Warning: Triton: [Triton], and 1 more. `manta doctor` says more."
    assert start.times_asked == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it ended with SIGSEGV"),
        ("raise SystemExit(3)", "it ended with exit code 3"),
        ("import time; time.sleep(60)", "TimeoutExpired in 0.5 s"),
        ("print('no JSON')", "it ended with exit code 0"),
        ("import os; os.write(1, bytes([255]))", "it ended with exit code 0"),
    ],
)
def test_a_doctor_that_dies_keeps_no_server_from_starting(
    start: Start, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    if "sleep" in program:
        monkeypatch.setattr(at_start, "TIMEOUT_S", 0.5)
    start.doctor(program)
    assert f"Warning: manta doctor: {said}. `manta doctor` says more." in start.look()


def test_without_a_driver_nothing_is_said(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start.finds(driver="good")
    monkeypatch.setattr(at_start, "NVIDIA", tmp_path / "none")
    assert start.look() == ""
    assert start.times_asked == 0


def test_a_cache_that_cannot_be_written_is_no_matter(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start.finds(driver="good")
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        assert "The GPU is well" in start.look()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", classmethod(_no_home))
    assert "The GPU is well" in start.look()


def test_a_cache_that_cannot_be_looked_at_is_no_matter(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's, which a container's `HOME=/root` is where its user is not root; here the name is too long."""
    start.finds(driver="good")
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 300}")
    for _ in range(2):
        assert "The GPU is well" in start.look()


def test_a_start_without_a_gpu_does_not_wait_for_what_doctor_needs() -> None:
    program = "import sys, cluster.commands.doctor.at_start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "psutil", "packaging", "cluster.commands.doctor.machine"}.intersection(loaded)


def _no_home(_: object) -> Path:
    raise RuntimeError("no home")
