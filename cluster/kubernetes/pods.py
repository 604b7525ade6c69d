"""Pod templates of the Ray cluster, by role. Where they run, who they are, and what they may do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config import KubernetesConfig, MantaConfig
from cluster.kubernetes import names
from cluster.kubernetes.containers import POD_SECURITY, RAY_SESSIONS, SECURITY, ray_container, volumes
from cluster.kubernetes.names import Role
from cluster.kubernetes.pod_config import in_pods
from cluster.kubernetes.sizes import PodSize

Document = dict[str, Any]

API_ACCESS = "/var/run/secrets/kubernetes.io/serviceaccount"


def pod_template(
    role: Role,
    labels: Mapping[str, str],
    size: PodSize,
    config: MantaConfig,
    *,
    stream_s: int,
    load_s: int,
    models: tuple[str, ...],
) -> Document:
    """Of one role, or with more `labels` of one kind of its pods. `models` are those on the volume.

    Streams get `stream_s` to end, the pod some seconds more.
    """
    has_models = bool(models)
    settings = config.kubernetes
    container = ray_container(
        role,
        size,
        in_pods(config).gateway,
        ray_service=settings.name,
        image=settings.image,
        stream_s=stream_s,
        load_s=load_s,
        gpu_resource=settings.gpu_resource,
        ephemeral_storage_gib=settings.ephemeral_storage_gib,
        has_models=has_models,
    )
    spec: Document = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "priorityClassName": names.priority_class(role),
        "terminationGracePeriodSeconds": stream_s + 60,
        "securityContext": dict(POD_SECURITY),
        "topologySpreadConstraints": [
            _spread(labels, "kubernetes.io/hostname"),
            _spread(labels, "topology.kubernetes.io/zone"),
        ],
        "containers": [container],
        "volumes": volumes(size.shared_memory_mib, settings.ephemeral_storage_gib, has_models=has_models),
    }
    of_pod = {**labels, "app.kubernetes.io/part-of": "manta"}
    if role == "head":
        of_pod[names.ASKS_API_SERVER] = "yes"
        spec["volumes"].append(_api_access())  # mounted by the autoscaler's container only
        if has_models:
            spec["initContainers"] = [_wait_for_models(container, models)]
    else:
        spec["serviceAccountName"] = names.SERVICE_ACCOUNT
    if size.gpus:
        spec["nodeSelector"] = dict(settings.gpu_node_selector)
        spec["tolerations"] = [{"key": settings.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
        spec["tolerations"] += [_toleration(key, value) for key, value in settings.gpu_taints.items()]
    elif names.TIER in labels and settings.cpu_expert_node_selector:
        spec["nodeSelector"] = dict(settings.cpu_expert_node_selector)
    return {"metadata": {"labels": of_pod}, "spec": spec}


def _toleration(key: str, value: str) -> Document:
    """Of that taint, whatever its effect."""
    return {"key": key, "operator": "Equal", "value": value} if value else {"key": key, "operator": "Exists"}


def autoscaler_options(settings: KubernetesConfig) -> Document:
    """KubeRay's container beside the head: the one process here that asks Kubernetes for something."""
    limits = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    return {
        "version": "v2",
        "idleTimeoutSeconds": settings.idle_timeout_s,
        "upscalingMode": "Default",
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": SECURITY,
        "env": [{"name": "HOME", "value": names.CONTAINER_USER_HOME}],
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            RAY_SESSIONS,
            {"name": "home", "mountPath": names.CONTAINER_USER_HOME},
            {"name": "api-access", "mountPath": API_ACCESS, "readOnly": True},
        ],
    }


def _spread(labels: Mapping[str, str], topology_key: str) -> Document:
    """Over machines and zones as far as there are any: eight experts may well share one machine with eight GPUs."""
    return {
        "maxSkew": 1,
        "topologyKey": topology_key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(labels)},
    }


def _api_access() -> Document:
    return {
        "name": "api-access",
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
            ],
        },
    }


def _wait_for_models(container: Document, models: tuple[str, ...]) -> Document:
    """The cluster begins once the Job has fetched and verified what it is to serve."""
    small = {"cpu": "200m", "memory": "512Mi", "ephemeral-storage": "1Gi"}
    return {
        "name": "wait-for-models",
        "image": container["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": ["manta", "fetch", "--wait", *models],
        "securityContext": SECURITY,
        "env": container["env"],
        "resources": {"requests": dict(small), "limits": dict(small)},
        "volumeMounts": container["volumeMounts"],
    }
