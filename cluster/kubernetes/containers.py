"""The Ray container of a pod: security, environment, mounts, ports, probes; nearly the same for every role.

KubeRay writes the command (`ray start …`), a first container that waits for the head, and the token's variables.
"""

from __future__ import annotations

from typing import Any

from cluster.config import GatewayConfig
from cluster.kubernetes import names
from cluster.kubernetes.names import Role
from cluster.kubernetes.sizes import PodSize
from cluster.ray_variables import ACTIVE_HEAD, BASE, doors, haproxy

Document = dict[str, Any]

# Of the head and the autoscaler beside it. Where nothing is mounted there, KubeRay adds a volume without a bound.
RAY_SESSIONS: Document = {"name": "tmp", "mountPath": "/tmp/ray", "subPath": "ray"}
LAUNCHER = "/opt/manta/bin/manta-haproxy"  # of the image
PROBE_PERIOD_S = 5

POD_SECURITY: Document = {
    "runAsNonRoot": True,
    "runAsUser": names.USER,
    "runAsGroup": names.USER,
    "fsGroup": names.USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
SECURITY: Document = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": names.USER,
    "runAsGroup": names.USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def ray_container(
    role: Role,
    size: PodSize,
    gateway: GatewayConfig,
    *,
    ray_service: str,
    image: str,
    stream_s: int,
    load_s: int,
    gpu_resource: str,
    ephemeral_storage_gib: int,
    has_models: bool,
) -> Document:
    """`gateway` as it is in pods; `stream_s`: what the longest stream may take; `load_s`: a model until it answers."""
    limits = {
        "cpu": str(size.cpus),
        "memory": f"{size.memory_mib}Mi",
        "ephemeral-storage": f"{ephemeral_storage_gib}Gi",
    }
    if size.gpus:
        limits[gpu_resource] = str(size.gpus)
    container: Document = {
        "name": "ray-head" if role == "head" else "ray-worker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": SECURITY,
        "env": environment(gateway, ray_service, stream_s, has_models=has_models),
        "ports": _ports(role),
        "resources": {"requests": dict(limits), "limits": dict(limits)},  # equal: the pod's quality is Guaranteed
        "volumeMounts": mounts(role, has_models=has_models),
        "startupProbe": _startup_probe(role, load_s),
        "readinessProbe": _probe(*_ready(role), failures=2),
        "livenessProbe": _probe("/api/healthz", names.AGENT_PORT, failures=12),
        # Ray is told that the node goes, so that replacements start elsewhere, and streams end by themselves.
        "lifecycle": {"preStop": {"exec": {"command": ["manta", "k8s", "drain", "--timeout", str(stream_s)]}}},
    }
    return container


def environment(gateway: GatewayConfig, ray_service: str, stream_s: int, *, has_models: bool) -> list[Document]:
    """Variables that every process of the cluster needs; KubeRay adds those of Ray's token."""
    # Its RAY_AUTH_MODE is KubeRay's as well, from 1.6 on. One before that knows no authOptions and drops them: no Ray
    # starts then, for want of a token, where else one would start that is open to all.
    variables = BASE | haproxy(LAUNCHER) | doors(gateway)
    variables |= {
        # HAProxy reloads whenever a gateway comes or goes; the old one ends the streams that it has.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(stream_s),
        ACTIVE_HEAD: names.head_service(ray_service),
        "HOME": names.CONTAINER_USER_HOME,
    }
    if has_models:
        variables |= {"HF_HOME": names.MODELS, "HF_HUB_OFFLINE": "1"}
    return [{"name": name, "value": value} for name, value in sorted(variables.items())]


def mounts(role: Role, *, has_models: bool) -> list[Document]:
    """Where the container may write, and what it is given to read."""
    writable = {"tmp": "/tmp", "home": names.CONTAINER_USER_HOME, "shared-mem": "/dev/shm"}
    given = {
        "api-keys": names.API_KEYS_FILE.rsplit("/", 1)[0],
        "lane-secret": names.LANE_SECRET_FILE.rsplit("/", 1)[0],
        "metrics-token": names.METRICS_TOKEN_FILE.rsplit("/", 1)[0],
    } | ({"models": names.MODELS} if has_models else {})
    return [
        *({"name": name, "mountPath": path} for name, path in writable.items()),
        *([RAY_SESSIONS] if role == "head" else []),
        *({"name": name, "mountPath": path, "readOnly": True} for name, path in given.items()),
    ]


def volumes(shared_memory_mib: int, ephemeral_storage_gib: int, *, has_models: bool) -> list[Document]:
    """Of the mounts above. Secrets are the group's to read, nobody else's."""
    # Ray's sessions and logs, sockets, HAProxy's files; what the container prints and the other volumes need the rest.
    of_tmp_mib = ephemeral_storage_gib * 1024 * 8 // 10
    found: list[Document] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{of_tmp_mib}Mi"}},
        {"name": "home", "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_mib}Mi"}},
    ]
    for name, secret, path in (
        ("api-keys", names.API_KEYS_SECRET, names.API_KEYS_FILE),
        ("lane-secret", names.LANE_SECRET, names.LANE_SECRET_FILE),
        ("metrics-token", names.METRICS_TOKEN_SECRET, names.METRICS_TOKEN_FILE),
    ):
        file = path.rsplit("/", 1)[1]
        items = [{"key": file, "path": file}]
        found.append({"name": name, "secret": {"secretName": secret, "defaultMode": 0o440, "items": items}})
    if has_models:
        found.append({"name": "models", "persistentVolumeClaim": {"claimName": names.MODEL_CLAIM, "readOnly": True}})
    return found


def _ports(role: Role) -> list[Document]:
    ports = {"serve": 8000, "metrics": names.RAY_METRICS_PORT}
    if role == "head":
        ports |= {"dashboard": names.DASHBOARD_PORT, "gcs-server": names.GCS_PORT}
    if role == "gateway":
        ports |= {"grpc": 9000}
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def _ready(role: Role) -> tuple[str, int]:
    """A gateway is ready while its doors stand and its Ray cluster is the active one.

    A model that reloads is its own 503, with a Retry-After.
    """
    return ("/-/ready", 8000) if role == "gateway" else ("/api/healthz", names.AGENT_PORT)


def _startup_probe(role: Role, load_s: int) -> Document:
    """Loading is not broken: a gateway first counts as started when every model answers, however long that takes."""
    if role == "gateway":
        return _probe("/health", 8000, failures=load_s // PROBE_PERIOD_S)
    return _probe("/api/healthz", names.AGENT_PORT, failures=60)


def _probe(path: str, port: int, *, failures: int) -> Document:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": PROBE_PERIOD_S,
        "timeoutSeconds": 4,
        "failureThreshold": failures,
    }
