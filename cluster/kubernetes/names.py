"""Names, paths and ports that the manifests under `k8s/base` and the rendered ones agree on."""

from __future__ import annotations

from typing import Literal

Role = Literal["head", "gateway", "coordinator", "expert"]

# A label of the pods and, as KubeRay hands it on, of the Ray nodes in them.
ROLE = "manta/role"
TIER = "manta/tier"  # of pods with experts, where some are on GPUs and some on CPUs: "gpu", "cpu"
JOB = "manta/job"  # of the pods of a Job, instead of a role
ASKS_API_SERVER = "manta/api-server"  # "yes": the pod may talk to the API server

NAMESPACE = "manta"
SERVICE = "manta"
SERVICE_ACCOUNT = "manta"
USER = 10001  # of the image, and of its files

CONTAINER_USER_HOME = "/home/manta"
MODELS = "/models"  # a hub cache (HF_HOME), read-only where it is served from
MODEL_CLAIM = "manta-models"

RAY_TOKEN_SECRET = "manta-ray-token"  # key `auth_token`, as KubeRay wants it
API_KEYS_SECRET, API_KEYS_FILE = "manta-api-keys", "/etc/manta/api-keys/keys.yaml"
LANE_SECRET, LANE_SECRET_FILE = "manta-lane-secret", "/etc/manta/lane/secret"
METRICS_TOKEN_SECRET, METRICS_TOKEN_FILE = "manta-metrics-token", "/etc/manta/metrics/token"
REDIS_PASSWORD_SECRET = "manta-redis-password"  # key `password`; of the overlay with Redis
HUB_TOKEN_SECRET, HUB_TOKEN_FILE = "manta-hub-token", "/etc/manta/hub/token"

MAX_NAME = 50  # of what KubeRay makes; it keeps the end of a longer one

AGENT_PORT = 52365  # Ray's agent on each node; /api/healthz needs no token
DASHBOARD_PORT = 8265
GCS_PORT = 6379
RAY_METRICS_PORT = 8080


def priority_class(role: Role) -> str:
    """Of the pods of that role."""
    return f"manta-{role}"


def head_service(ray_service: str) -> str:
    """The Service that KubeRay keeps at the head of the active Ray cluster, by its own rules for names."""
    name = f"{ray_service}-head-svc"[-MAX_NAME:]
    return name if name[0].isalpha() else f"r{name[1:]}"
