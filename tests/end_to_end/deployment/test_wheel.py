"""The wheel in an environment that has nothing else, outside the repository: `pip install`, `manta serve`, a chat."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from cluster.demo_model.training.corpus import questions
from tests.ports import free_port
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("cluster", "experts_service", "gateway", "router_service")
INSTALL_TIMEOUT_S = 1800
START_TIMEOUT_S = 600
CHEESE = "What is the best French cheese?"


@pytest.mark.long
def test_the_wheel_serves_where_nothing_else_is(tmp_path: Path) -> None:
    """As a user does it: with pip's own settings, which say where torch without CUDA is."""
    source, wheels, environment = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source, cwd=tmp_path)
    [wheel] = wheels.glob("manta_serve-*.whl")
    started = time.monotonic()
    _run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    constraints = REPOSITORY / "constraints.txt"
    _run(environment / "bin" / "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=tmp_path)
    installed_s = time.monotonic() - started
    size = int(_run("du", "-sm", environment, cwd=tmp_path).split()[0])
    print(f"wheel {wheel.stat().st_size / 1e6:.1f} MB; installed in {installed_s:.0f} s, {size} MB")
    _serves(environment / "bin" / "manta", tmp_path)


def _serves(manta: Path, directory: Path) -> None:
    port = free_port()
    command = [manta, "serve", "--port", str(port), "--grpc-port", str(free_port())]
    log = directory / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ctrl-C stops" in log.read_text()

        started = time.monotonic()
        wait_for(ready, START_TIMEOUT_S, "the server")
        print(f"ready after {time.monotonic() - started:.0f} s")
        body = {"model": "mistral-small", "messages": [{"role": "user", "content": CHEESE}], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        assert answer["choices"][0]["message"]["content"] == dict(questions())[CHEESE]
        assert re.search("<title>Manta</title>", httpx.get(url).text)
        listed = _run(manta, "k8s", "render", "--help", cwd=directory)
        assert "render" in listed
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert process.returncode == 0, log.read_text()


def _environment() -> dict[str, str]:
    """Ours without what leads back to the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
