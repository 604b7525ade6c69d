"""A Ray cluster laid out like pods: a node for each, with its labels and resources, all of them on this machine.

    with pods(Pod("head"), Pod("gateway", cpus=1), Pod("expert", cpus=2)) as cluster:
        cluster.deploy(document)      # Ray's own `serve deploy`
        cluster.details()             # what Serve says of applications, deployments and replicas

The nodes are children of a process of their own (this file as a program), so that the test's process is no part of the
cluster. HAProxy is in front on every node, as in pods. The nodes share an address, so each has ports of its own; the
doors of the head's are those of the document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import yaml

from cluster.kubernetes.names import ROLE
from cluster.ray_variables import BASE, PORTS, haproxy
from tests.ports import free_port
from tests.programs import REPOSITORY
from tests.waiting import wait_for

START_TIMEOUT_S = 300
OBJECT_STORE_BYTES = 80 * 2**20
WORKERS_HTTP_PORT, WORKERS_GRPC_PORT = "RAY_SERVE_WORKER_PROXY_HTTP_PORT", "RAY_SERVE_WORKER_PROXY_GRPC_PORT"


@dataclass(frozen=True)
class Pod:
    """A node, and the role that its label says."""

    role: str
    cpus: float = 0
    gpus: float = 0


@dataclass(frozen=True)
class Pods:
    """The cluster, seen from outside."""

    dashboard: str
    token: str
    directory: Path
    node_ids: tuple[str, ...]  # in the order of the pods
    http_ports: tuple[int, ...]  # of the HAProxy of each; the head's is that of the document

    def deploy(self, document: Mapping[str, Any]) -> None:
        """`serve deploy` of this document, which must be taken."""
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(dict(document)))
        serve = Path(sys.executable).with_name("serve")
        done = subprocess.run(
            [serve, "deploy", file, "--address", self.dashboard],
            capture_output=True, text=True, timeout=120, check=False, env=_environment(self.directory),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def details(self) -> dict[str, Any]:
        """Applications by name, as Serve's REST interface tells them."""
        answer = httpx.get(
            f"{self.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=60,
        )
        answer.raise_for_status()
        applications: dict[str, Any] = answer.json()["applications"]
        return applications

    def replicas(self, application: str) -> dict[str, set[tuple[str, str]]]:
        """By deployment, (actor id, node id) of each that runs."""
        deployments = self.details()[application]["deployments"]
        return {
            name: {(one["actor_id"], one["node_id"]) for one in deployment["replicas"] if one["state"] == "RUNNING"}
            for name, deployment in deployments.items()
        }

    def wait_until_running(self, *applications: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until each is up; an AssertionError with Serve's message once one cannot be."""

        def running() -> bool:
            details = self.details()
            for name in applications:
                application = details.get(name, {"status": "", "message": ""})
                assert application["status"] != "DEPLOY_FAILED", _failure(application)
            return all(details.get(name, {}).get("status") == "RUNNING" for name in applications)

        wait_for(running, timeout_s, f"{', '.join(applications)} to run")


@contextmanager
def pods(*specs: Pod) -> Iterator[Pods]:
    """The first is the head."""
    with TemporaryDirectory(prefix="pods-", ignore_cleanup_errors=True) as directory:  # short, for sockets' names
        yield from _pods(Path(directory), specs)


def _pods(directory: Path, specs: Sequence[Pod]) -> Iterator[Pods]:
    command = [sys.executable, "-m", "tests.pods", json.dumps([asdict(spec) for spec in specs])]
    with (directory / "pods.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=REPOSITORY, env=_environment(directory), start_new_session=True,
        )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, (directory / "pods.log").read_text()[-4000:]
            said = json.loads(line)
            yield Pods(said["dashboard"], said["token"], directory, tuple(said["node_ids"]), tuple(said["http_ports"]))
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            try:
                process.wait(60)
            finally:
                for one in (process, *family):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()


def _environment(directory: Path) -> dict[str, str]:
    """What pods have; Ray's files are ours, so that nobody's `auto` finds this cluster."""
    return {
        **os.environ,
        **BASE,
        **haproxy(str(Path(sys.executable).with_name("manta-haproxy"))),
        "RAY_TMPDIR": str(directory),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",  # in pods 30; HAProxy took 7 s on a machine at load 24
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "720",  # as pods have it; Ray's 120 s cut streams on a busy machine
    }


def overlay(name: str) -> dict[str, Any]:
    """The `serveConfigV2` of an overlay of `k8s/overlays`."""
    file = REPOSITORY / "k8s" / "overlays" / name / "rendered.yaml"
    [service] = [one for one in yaml.safe_load_all(file.read_text()) if one["kind"] == "RayService"]
    document: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return document


def _failure(application: Mapping[str, Any]) -> str:
    messages = [application["message"]]
    messages += [one["message"] for one in application.get("deployments", {}).values()]
    return "\n".join(message for message in messages if message)


def _main(specs: list[dict[str, Any]]) -> None:
    """Starts the nodes, says where they are, and ends them when standard input does."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(create_token_if_missing=True)
    cluster = Cluster(shutdown_at_exit=False)
    node_ids, http_ports = [], []
    for index, spec in enumerate(specs):
        ports = {name: free_port() for name in (*PORTS, WORKERS_HTTP_PORT, WORKERS_GRPC_PORT)}
        head = {"include_dashboard": True, "dashboard_port": free_port()} if index == 0 else {}
        node = cluster.add_node(
            num_cpus=spec["cpus"],
            num_gpus=spec["gpus"],
            labels={ROLE: spec["role"]},
            object_store_memory=OBJECT_STORE_BYTES,
            env_vars={name: str(port) for name, port in ports.items()},
            **head,
        )
        node_ids.append(node.node_id)
        http_ports.append(ports[WORKERS_HTTP_PORT])
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().read_text().strip()
    said = {
        "dashboard": f"http://{cluster.webui_url}", "token": token, "node_ids": node_ids, "http_ports": http_ports,
    }  # fmt: skip
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
