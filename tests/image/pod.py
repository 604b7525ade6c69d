"""A pod of a rendered RayService on a host of `tests.hosts`, with the command that KubeRay writes.

What a container runtime would give it: an address and a name server, a tree of processes and mounts of its own; the
image as a root that nobody writes to; volumes, Secrets, the user, no capabilities, no new privileges. What is missing:
cgroups, so that nothing holds a pod to its memory and CPUs, and the seccomp profile.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.kubernetes import names
from cluster.kubernetes.check.quantities import parse_quantity
from tests.hosts import Host

Document = dict[str, Any]

GROUP = str(names.USER)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
RESOLVER = """\
nameserver {server}
search manta.svc.cluster.local svc.cluster.local cluster.local
options ndots:5
"""
WAIT_FOR_HEAD = "until ray health-check --address {head}:6379 > /dev/null 2>&1; do sleep 5; done"  # KubeRay's own


@dataclass(frozen=True)
class RayCluster:
    """What all pods of one have in common."""

    name: str
    head_service: str  # its name
    token: str
    secrets: Mapping[str, Mapping[str, str]]  # by the Secret's name: file → content
    root: Path  # the image's
    of_image: tuple[str, ...]  # variables that it sets
    directory: Path
    name_server: str  # its address


class Pod:
    """One, not yet started."""

    def __init__(self, cluster: RayCluster, group: Document, host: Host, name: str) -> None:
        self.cluster = cluster
        self._group = group
        self._template = group["template"]["spec"]
        self._container: Document = self._template["containers"][0]
        self._is_head = self._container["name"] == "ray-head"
        self._directory = cluster.directory / name
        self.host = host
        self.name = name
        self.log = self._directory / "log.txt"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """The pod's containers, but for the head's autoscaler, which needs an API server."""
        if self._directory.exists():
            shutil.rmtree(self._directory)
        self._directory.mkdir()
        self._make_volumes()
        head = self.cluster.head_service
        lines = self._mounting()
        if not self._is_head:
            lines.append(self._entering(["/bin/bash", "-c", "--", WAIT_FOR_HEAD.format(head=head)]))
        start = self._entering(["/bin/bash", "-c", "--", f"ulimit -n 65536; {self._ray_start()}"])
        (self._directory / "start.sh").write_text("\n".join([*lines, f"exec {start}", ""]))
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        with self.log.open("w") as log:
            self._process = self.host.start(
                [*unshare, "sh", "-eu", str(self._directory / "start.sh")], stdout=log, stderr=subprocess.STDOUT
            )

    def has_ended(self) -> bool:
        """By itself, or because it was told to."""
        return self._process is not None and self._process.poll() is not None

    @property
    def first_process(self) -> psutil.Process:
        """What the runtime sends SIGTERM to."""
        assert self._process is not None
        [first] = psutil.Process(self._process.pid).children()
        return first

    def memory_bytes(self) -> int:
        """What its cgroup would count: pages of all processes, each once, and what lies in /dev/shm."""
        pages = 0
        for process_id in self.host.process_ids():
            with suppress(FileNotFoundError, ProcessLookupError):
                rollup = Path(f"/proc/{process_id}/smaps_rollup").read_text()
                # Files, the libraries' code for example, are given back when memory is short.
                pages += sum(int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE))
        return pages * 1024

    @property
    def memory_limit_bytes(self) -> int:
        """As the manifest says."""
        return int(parse_quantity(self._container["resources"]["limits"]["memory"]) or 0)

    def disk_problems(self) -> list[str]:
        """Volumes on disk in which more lies than their bound: the kubelet would evict the pod."""
        problems = []
        for volume in self._template["volumes"]:
            bound = volume.get("emptyDir", {"medium": "Memory"})
            if bound.get("medium") is None:
                counted = subprocess.run(
                    ["du", "-sb", self._directory / volume["name"]], capture_output=True, text=True
                )
                size, limit = int(counted.stdout.split()[0]), int(parse_quantity(bound["sizeLimit"]) or 0)
                if size > limit:
                    problems.append(f"{volume['name']}: {size} of {limit} bytes")
        return problems

    def run(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` does, and the kubelet for a hook."""
        there = ["nsenter", f"--target={self.first_process.pid}", "--all", "--root"]
        entered = [*there, "sh", "-c", self._as_user(command)]
        return subprocess.run(entered, capture_output=True, text=True, timeout=timeout_s, check=False)

    def before_stop(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """The pod's preStop hook."""
        return self.run(self._container["lifecycle"]["preStop"]["exec"]["command"], timeout_s)

    def terminate(self, timeout_s: float) -> float:
        """SIGTERM to its first process. Returns after how many seconds all of them were gone."""
        assert self._process is not None
        started = time.monotonic()
        os.kill(self.first_process.pid, signal.SIGTERM)
        self._process.wait(timeout_s)
        return time.monotonic() - started

    def probe(self, kind: str, asker: Host) -> int | None:
        """The status that the kubelet would see: of the "startup", "readiness" or "liveness" probe."""
        probe = self._container[f"{kind}Probe"]
        url = "http://{}:{port}{path}".format(self.host.address, **probe["httpGet"])

        def ask() -> int | None:
            try:
                return httpx.get(url, timeout=probe["timeoutSeconds"]).status_code
            except httpx.TransportError:
                return None

        return asker.run(ask)

    def _ray_start(self) -> str:
        """KubeRay's command, by `ray-operator/controllers/ray/common/pod.go`."""
        limits = self._container["resources"]["limits"]
        options = {
            "dashboard-agent-listen-port": str(names.AGENT_PORT),
            "metrics-export-port": str(names.RAY_METRICS_PORT),
            "memory": str(int(parse_quantity(limits["memory"]) or 0)),
            "num-cpus": str(int(parse_quantity(limits["cpu"]) or 0)),
            "labels": ",".join(f"{name}={value}" for name, value in sorted(self._group["labels"].items())),
            **self._group["rayStartParams"],
        }
        flags = ["--block"]
        if self._is_head:
            flags += ["--head", "--no-monitor"]
        else:
            options["address"] = f"{self.cluster.head_service}:6379"
        return " ".join(["ray start", *flags, *(f"--{name}={value}" for name, value in sorted(options.items()))])

    def _environment(self) -> dict[str, str]:
        head = self.cluster.head_service
        of_kuberay = {
            "RAY_CLUSTER_NAME": self.cluster.name,
            "RAY_CLOUD_INSTANCE_ID": self.name,
            "RAY_NODE_TYPE_NAME": self._group.get("groupName", "headgroup"),
            "RAY_PORT": "6379",
            "RAY_ADDRESS": "127.0.0.1:6379" if self._is_head else f"{head}:6379",
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            "RAY_worker_niceness": "0",  # not KubeRay's: a pod has its share of the cores, which it has not here
            "RAY_AUTH_TOKEN": self.cluster.token,
            **(
                {"RAY_enable_autoscaler_v2": "true"}
                if self._is_head
                else {"FQ_RAY_IP": head, "RAY_IP": head.split(".")[0]}
            ),
        }
        of_image = dict(one.split("=", 1) for one in self.cluster.of_image)
        return of_image | of_kuberay | {one["name"]: one["value"] for one in self._container["env"]}

    def _make_volumes(self) -> None:
        """As the kubelet: of the pod's group, which may write to what is no Secret."""
        for volume in self._template["volumes"]:
            place = self._directory / volume["name"]
            if "secret" in volume:
                place.mkdir(mode=0o755)
                for item in volume["secret"]["items"]:
                    file = place / item["path"]
                    file.write_text(self.cluster.secrets[volume["secret"]["secretName"]][item["key"]])
                    file.chmod(volume["secret"]["defaultMode"])
                    shutil.chown(file, group=names.USER)
            elif volume.get("emptyDir", {"medium": "Memory"}).get("medium") is None:
                for folder in (place, place / "ray"):
                    folder.mkdir()
                    shutil.chown(folder, group=names.USER)
                    folder.chmod(0o2777)
        (self._directory / "root").mkdir()
        (self._directory / "resolv.conf").write_text(RESOLVER.format(server=self.cluster.name_server))

    def _mounting(self) -> list[str]:
        """A shell's lines: the root, read-only, and what is mounted in it."""
        root = self._directory / "root"
        volumes = {volume["name"]: volume for volume in self._template["volumes"]}
        lines = [
            "mount --make-rprivate /",
            f"mount --bind {self.cluster.root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mount -t tmpfs -o mode=755 tmpfs {root}/dev",
            *(f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in DEVICES),
            f"ln -s /proc/self/fd {root}/dev/fd",
            f"mkdir {root}/dev/shm",
            f"mount --bind {self._directory / 'resolv.conf'} {root}/etc/resolv.conf",
            f"hostname {self.name}",
        ]
        for mount in self._container["volumeMounts"]:
            place = f"{root}{mount['mountPath']}"
            empty = volumes[mount["name"]].get("emptyDir", {})
            if empty.get("medium") == "Memory":
                size = int(parse_quantity(empty["sizeLimit"]) or 0)
                lines.append(f"mount -t tmpfs -o mode=1777,size={size} tmpfs {place}")
                continue
            source = self._directory / mount["name"] / mount.get("subPath", "")
            lines.append(f"mount --bind {source} {place}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {place}")
        return lines

    def _entering(self, command: list[str]) -> str:
        return f"chroot {self._directory / 'root'} {self._as_user(command)}"

    def _as_user(self, command: list[str]) -> str:
        """With nothing of ours left."""
        security = self._container["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["allowPrivilegeEscalation"] is False
        user = ["setpriv", f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", f"--groups={GROUP}"]
        user += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        return shlex.join([*user, "env", "--ignore-environment", "--chdir=/home/manta", *environment, *command])


def prepare_root(root: Path, templates: Iterable[Document]) -> None:
    """What a runtime makes in an image before its root is read-only: the places that something is mounted on."""
    for template in templates:
        for mount in template["spec"]["containers"][0]["volumeMounts"]:
            if not mount["mountPath"].startswith(("/tmp", "/dev")):
                (root / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
    resolver = root / "etc" / "resolv.conf"
    resolver.unlink(missing_ok=True)  # Debian's may be a link
    resolver.touch()
