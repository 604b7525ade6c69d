"""A Ray cluster over hosts, and a Manta on it: the head's host has doors and coordinator, the others the experts."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from cluster.demo_model import DIRECTORY as DEMO
from tests.hosts import Host
from tests.processes import called, proc_file
from tests.waiting import wait_for

BIN = Path(sys.executable).parent
PORT, GRPC_PORT, RAY_PORT = 8000, 9000, 6379  # each host has its own
START_TIMEOUT_S = 300
CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    label_selector: {{role: front}}
    engine: {{dtype: float32, max_model_len: 512, kv_cache_gib: 0.1}}
    experts:
      groups: [[0, 1, 2, 3], [4, 5, 6, 7]]
      scaling: {{min_replicas: 2, max_replicas: 2}}
      label_selector: {{role: experts}}
gateway: {{http_port: {PORT}, grpc_port: {GRPC_PORT}, label_selector: {{role: front}}}}
"""
_REPLICA = re.compile(r"ray::ServeReplica:demo-\w+:(expert-[-\w]+)")  # a process's title


@dataclass
class RayHosts:
    """The head's host and those with experts."""

    head: Host
    others: tuple[Host, ...]
    directory: Path  # of this cluster alone
    gpus: tuple[int, ...] = ()  # that the others say they have; their label `tier` is gpu, or cpu
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_storage": "rocksdb",  # the GCS survives its death
            "RAY_gcs_storage_path": str(self.directory / "gcs"),
        }

    @property
    def address(self) -> str:
        return f"{self.head.address}:{RAY_PORT}"

    def start(self) -> None:
        """Ray on all of them."""
        (self.directory / "gcs").mkdir()
        head = ("--head", f"--port={RAY_PORT}", f"--temp-dir={self.directory}", "--include-dashboard=false")
        self._ray(self.head, "front", *head)
        with ThreadPoolExecutor(len(self.others)) as threads:  # each takes seconds, and mostly waits
            list(threads.map(self._join, self.others, self.gpus or (0,) * len(self.others)))

    def _join(self, host: Host, gpus: int) -> None:
        role = f"experts,tier={'gpu' if gpus else 'cpu'}"
        self._ray(host, role, f"--address={self.address}", f"--num-gpus={gpus}")

    def _ray(self, host: Host, role: str, *arguments: str) -> None:
        """Start a node. Ray gives one thirty seconds, which a machine that is busy with another may not have."""
        command = [BIN / "ray", "start", *arguments, f"--node-ip-address={host.address}", "--num-cpus=1"]
        command += [f"--labels=role={role}", "--object-store-memory=80000000", "--include-log-monitor=false"]
        log = self.directory / f"ray-{host.address}.log"
        for _ in range(3):
            with log.open("w") as output:
                started = host.start(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
            if started.wait(START_TIMEOUT_S) == 0:
                return
            host.kill()
        raise AssertionError(log.read_text())

    def gcs(self) -> psutil.Process:
        """The process of Ray's global control store."""
        on_host = self.head.process_ids()
        return called("gcs_server", [one for one in psutil.process_iter() if one.pid in on_host])

    def experts_on(self, host: Host) -> list[str]:
        """The expert deployments that have a replica there, once for each."""
        replicas = [_REPLICA.match(_title(process_id)) for process_id in host.process_ids()]
        return sorted(replica[1] for replica in replicas if replica is not None)

    @contextmanager
    def manta(self, config: str = CONFIG) -> Iterator[None]:
        """`manta serve` on the head's host, ready."""
        file = self.directory / "manta.yaml"
        file.write_text(config)
        command = [BIN / "manta", "serve", "--config", file, "--address", self.address]
        log = self.directory / "manta.log"
        with log.open("w") as output:
            server = self.head.start(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)

        def is_ready() -> bool:
            assert server.poll() is None, log.read_text()
            return self.head.run(is_healthy)

        wait_for(is_ready, START_TIMEOUT_S, "the server")
        yield


def is_healthy() -> bool:
    """Whether the server on this host can answer."""
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def frames() -> dict[str, float]:
    """Dispatches over lanes, by shard, as the server on this host tells."""
    page = httpx.get(f"http://127.0.0.1:{PORT}/metrics", timeout=60).text
    lines = [line for line in page.splitlines() if line.startswith("manta_shard_frames_total{")]
    return {labels: float(value) for labels, _, value in (line.rpartition(" ") for line in lines)}


def _title(process_id: int) -> str:
    return proc_file(process_id, "cmdline").partition("\0")[0]


@contextmanager
def ray_hosts(all_hosts: tuple[Host, ...], gpus: tuple[int, ...] = ()) -> Iterator[RayHosts]:
    """Ray on these, the first being the head's; what it leaves on disk goes with the block.

    `gpus`: how many each of the others says it has.
    """
    directory = Path(tempfile.mkdtemp(prefix="mh"))  # short: sockets lie below
    try:
        cluster = RayHosts(all_hosts[0], all_hosts[1:], directory, gpus)
        cluster.start()
        yield cluster
    finally:
        for host in all_hosts:
            host.kill()
        shutil.rmtree(directory, ignore_errors=True)
