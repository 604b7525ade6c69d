"""The RayService: Serve's configuration, and the Ray cluster that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from ray import __version__ as ray_version

from cluster.config import MantaConfig, ModelConfig
from cluster.deploy.serve_config import serve_config
from cluster.kubernetes import names
from cluster.kubernetes.names import Role
from cluster.kubernetes.pod_config import in_pods
from cluster.kubernetes.pods import autoscaler_options, pod_template
from cluster.kubernetes.sizes import OBJECT_STORE_MIB, PodGroup, PodSize, head_size, pod_groups

Document = dict[str, Any]

# What a stream may take beyond its deadline: for 90 s a connection that is kept alive may still begin one, through the
# HAProxy that is on its way out, and then the last byte has to go out.
STREAM_MARGIN_S = 90 + 30
LOAD_MARGIN_S = 900  # beyond the load deadline: the machine is added, the image pulled, Ray started


def ray_service(config: MantaConfig) -> Document:
    """Raises ConfigError or DoesNotFit for what cannot be served."""
    groups = pod_groups(config)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": config.kubernetes.name, "labels": {"app.kubernetes.io/part-of": "manta"}},
        "spec": {
            # What changes under rayClusterConfig makes a new cluster beside the old one; a model rolls inside it.
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": stream_s(config),
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(serve_config(in_pods(config)), sort_keys=False, width=110),
            "rayClusterConfig": {
                "rayVersion": ray_version,
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": autoscaler_options(config.kubernetes),
                "authOptions": {"mode": "token", "secretName": names.RAY_TOKEN_SECRET},
                "headGroupSpec": _head(config),
                "workerGroupSpecs": [_worker_group(name, group, config) for name, group in groups.items()],
            },
        },
    }


def stream_s(config: MantaConfig) -> int:
    """What a pod gives its streams to end."""
    return int(config.gateway.request_timeout_s) + STREAM_MARGIN_S


def models_to_fetch(config: MantaConfig) -> tuple[str, ...]:
    """What `manta fetch` brings, each once: what is not in the image."""
    return tuple(dict.fromkeys(fetched_name(model) for model in config.models if is_fetched(model.path)))


def fetched_name(model: ModelConfig) -> str:
    """As `manta fetch` takes it."""
    return model.path if model.revision is None else f"{model.path}@{model.revision}"


def is_fetched(path: str) -> bool:
    """Whether a model comes from the hub: neither a directory of the image nor embedded in the code."""
    return "/" in path and not path.startswith(("/", "~", "."))


def _head(config: MantaConfig) -> Document:
    return {
        "serviceType": "ClusterIP",
        "labels": {names.ROLE: "head"},
        "rayStartParams": {
            "num-cpus": "0",  # no work lands here
            "num-gpus": "0",
            "dashboard-host": "0.0.0.0",  # the operator asks it; Ray's token guards it
            "object-store-memory": str(OBJECT_STORE_MIB * 2**20),
        },
        "template": _template("head", {names.ROLE: "head"}, head_size(config.kubernetes.head_cpus), config),
    }


def _worker_group(name: str, group: PodGroup, config: MantaConfig) -> Document:
    start = {"object-store-memory": str(OBJECT_STORE_MIB * 2**20)}
    if group.size.gpus:  # KubeRay and the autoscaler know GPUs only by resources whose names end in "gpu", no slices
        start["num-gpus"] = str(group.size.gpus)
    return {
        "groupName": name,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
        "idleTimeoutSeconds": config.kubernetes.idle_timeout_s,
        "labels": group.labels,  # of the pods, and of the Ray nodes: what label_selector asks for
        "rayStartParams": start,
        "template": _template(group.role, group.labels, group.size, config),
    }


def _template(role: Role, labels: Mapping[str, str], size: PodSize, config: MantaConfig) -> Document:
    load_s = max(int(model.experts.load_timeout_s) for model in config.models) + LOAD_MARGIN_S
    return pod_template(
        role,
        labels,
        size,
        config,
        stream_s=stream_s(config),
        load_s=load_s,
        models=models_to_fetch(config),
    )
