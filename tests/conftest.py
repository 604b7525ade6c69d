"""One running server per test session, started as a user starts it, and a driver's connection to its Ray cluster."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import hypothesis
import psutil
import pytest

from tests.ports import free_port
from tests.processes import called
from tests.waiting import wait_for
from tests.workers import pytest_xdist_make_scheduler, sort_for_workers

__all__ = ["pytest_xdist_make_scheduler"]  # a hook

START_TIMEOUT_S = 600  # ten times what is promised for the demo on two cores
STOP_TIMEOUT_S = 60
# Of tests that compare tokens while processes come and go. In bf16 a token hangs on each last bit.
DTYPES = ["bfloat16", pytest.param("float32", marks=pytest.mark.long)]
LONG_TIMEOUT_S = 3 * 3600  # of a test marked long; the soak takes MANTA_SOAK_S of it

# Before a command: it gets Ctrl-C when this process dies, a worker that crashes for example. A dozen processes stayed.
ENDS_WITH_US = ("setpriv", "--pdeathsig", "INT") if shutil.which("setpriv") else ()

# The same examples in every run; HYPOTHESIS_PROFILE=default draws new ones. How long it takes to draw them says
# nothing here: before the first float Hypothesis reads all modules for constants, seconds on a busy machine.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell has what it starts in the background ignore Ctrl-C, and what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.umask(0o022)  # where a group may write what a user does, the files of keys that tests write would be refused
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# httpx gives up after five seconds, which a busy machine may stand still for: then it is no news of what answers.
vars(httpx.get.__kwdefaults__["timeout"]).update(dict.fromkeys(("connect", "read", "write", "pool"), 60.0))
# And it reads all certificates for each client, 25 ms, and a client for each request; here nobody speaks TLS.
httpx._transports.default.create_ssl_context = functools.cache(httpx._transports.default.create_ssl_context)
# As coordinators have it. Threads that spin while they wait for work take the cores from the other worker: what two
# processes did on two threads each took eight times the CPU.
os.environ.setdefault("GOMP_SPINCOUNT", "200")
# Ray's workers give way to all else, here to what the other worker of pytest computes: streams took minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
# Without a GPU, kernels for one are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A server is a dozen processes and more: without bytecode each compiles what it imports of ours.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A soak may take hours; whatever else hangs is ended by pytest-timeout, with the stacks of all threads."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S))
    if hasattr(config, "workerinput"):
        sort_for_workers(config, items)


@dataclass(frozen=True)
class Server:
    """A `manta serve` that answers."""

    url: str
    grpc_address: str
    ray_address: str
    process: subprocess.Popen[str]
    start_s: float  # until the first answer of /health with 200
    announcement: str  # what it has said by then


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors are: what runs on a CPU runs on a GPU as well, where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """`manta serve` with the embedded demo model."""
    with running_server() as running:
        yield running


@contextmanager
def running_server(config: str = "") -> Iterator[Server]:
    """`manta serve` with this text of a manta.yaml, if any. Ends it with Ctrl-C, and fails when a process is left."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "manta.yaml"
        file.write_text(config)
        with _started_server(*(("--config", str(file)) if config else ())) as server:
            yield server


@contextmanager
def _started_server(*arguments: str) -> Iterator[Server]:
    port, grpc_port = free_port(), free_port()
    manta = Path(sys.executable).with_name("manta")
    command = [*ENDS_WITH_US, manta, "serve", "--port", str(port), "--grpc-port", str(grpc_port), *arguments]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        # The address of a cluster that nobody asked for: a server once joined, and died of it, what else ran here.
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    children: list[psutil.Process] = []
    haproxy_files: Path | None = None
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_health(url, process, output)
        start_s = time.monotonic() - started
        wait_for(lambda: "Ctrl-C stops" in "".join(output), 30, "the announcement")
        announcement = "".join(output)
        ray_address = re.search(r"Ray +(\S+:\d+)", announcement)
        assert ray_address is not None, announcement
        yield Server(url, f"127.0.0.1:{grpc_port}", ray_address[1], process, start_s, announcement)
        if process.poll() is None:  # a test may have ended it
            children = psutil.Process(process.pid).children(recursive=True)
            raylet = called("raylet", children)
            if configuration := raylet.environ().get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"):  # none without HAProxy
                haproxy_files = Path(configuration).parent
                assert haproxy_files.exists()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"Ctrl-C did not stop the server: {''.join(output)}") from None
        reader.join(5)
        process.stdout.close()  # type: ignore[union-attr]
    assert process.returncode == 0, "".join(output)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"Ctrl-C left processes behind: {alive}"
    assert haproxy_files is None or not haproxy_files.exists(), f"Ctrl-C left files behind: {haproxy_files}"


@pytest.fixture(scope="session")
def ray_cluster(server: Server) -> Iterator[str]:
    """This process as a driver of the server's Ray cluster; tests deploy there under names of their own."""
    import ray

    ray.init(address=server.ray_address, log_to_driver=False, logging_level="error")
    yield server.ray_address
    ray.shutdown()


def _wait_for_health(url: str, process: subprocess.Popen[str], output: list[str]) -> None:
    def healthy() -> bool:
        assert process.poll() is None, f"manta serve ended: {''.join(output)}"
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(healthy, START_TIMEOUT_S, "the server")
