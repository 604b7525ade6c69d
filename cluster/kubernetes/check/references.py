"""What documents call by name has to be there: accounts, priority classes, claims, Secrets, and pods for selectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.kubernetes import names
from cluster.kubernetes.check.documents import Document, PodTemplate

_MADE_BY_KUBERNETES = {("ConfigMap", "kube-root-ca.crt")}
_IN_BASE = {("ServiceAccount", names.SERVICE_ACCOUNT)} | {
    ("PriorityClass", names.priority_class(role)) for role in ("head", "gateway", "coordinator", "expert")
}
_MADE_BY_SECRETS_JOB = {
    ("Secret", secret)
    for secret in (
        names.RAY_TOKEN_SECRET,
        names.API_KEYS_SECRET,
        names.LANE_SECRET,
        names.METRICS_TOKEN_SECRET,
        names.REDIS_PASSWORD_SECRET,
    )
}


def reference_problems(documents: Sequence[Document], templates: Sequence[PodTemplate]) -> Iterator[str]:
    """Where `k8s/base` was not given, what it holds is taken to be there."""
    there = {(document.kind, document.name) for document in documents} | _MADE_BY_KUBERNETES
    if not any(document.kind == "Namespace" for document in documents):
        there |= _IN_BASE | _MADE_BY_SECRETS_JOB
    for template in templates:
        if template.labels.get(names.JOB) == "secrets":
            there |= _MADE_BY_SECRETS_JOB
    for template in templates:
        for kind, name, field in _called(template.spec):
            if (kind, name) not in there:
                yield f"{template}.spec.{field}: there is no {kind} {name!r}"
        yield from _mounts(template)
    for document in documents:
        yield from _selected(document, templates)
        if document.kind == "RayService":
            cluster = (document.body.get("spec") or {}).get("rayClusterConfig") or {}
            secret = (cluster.get("authOptions") or {}).get("secretName")
            if secret and ("Secret", secret) not in there:
                yield f"{document}: spec.rayClusterConfig.authOptions.secretName: there is no Secret {secret!r}"


def _called(spec: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if name := spec.get("serviceAccountName"):
        yield "ServiceAccount", name, "serviceAccountName"
    if name := spec.get("priorityClassName"):
        yield "PriorityClass", name, "priorityClassName"
    for volume in spec.get("volumes", []):
        field = f"volumes[{volume.get('name')}]"
        sources = [volume, *(volume.get("projected") or {}).get("sources", [])]
        for source in sources:
            if (claim := source.get("persistentVolumeClaim")) is not None:
                yield "PersistentVolumeClaim", claim.get("claimName", ""), field
            if (secret := source.get("secret")) is not None and not secret.get("optional"):
                yield "Secret", secret.get("secretName", secret.get("name", "")), field
            if (config := source.get("configMap")) is not None and not config.get("optional"):
                yield "ConfigMap", config.get("name", ""), field
    for container in (*spec.get("initContainers", []), *spec.get("containers", [])):
        for variable in container.get("env", []):
            secret = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
            if secret and not secret.get("optional"):
                yield "Secret", secret.get("name", ""), f"containers[{container.get('name')}].env"


def _mounts(template: PodTemplate) -> Iterator[str]:
    claims = (template.owner.body.get("spec") or {}).get("volumeClaimTemplates") or []  # of a StatefulSet
    volumes = {volume.get("name") for volume in template.spec.get("volumes", [])}
    volumes |= {(claim.get("metadata") or {}).get("name") for claim in claims}
    for container in template.containers:
        for mount in container.get("volumeMounts", []):
            if mount.get("name") not in volumes:
                name, volume = container.get("name"), mount.get("name")
                yield f"{template}: container {name!r} mounts {volume!r}, which is no volume"


def _selected(document: Document, templates: Sequence[PodTemplate]) -> Iterator[str]:
    """Services, budgets and monitors that select no pod, and ports that their pods do not have."""
    spec = document.body.get("spec") or {}
    if document.kind == "Service":
        selector = {"matchLabels": spec.get("selector") or {}}
        ports = [str(port.get("targetPort", port.get("port"))) for port in spec.get("ports", [])]
    elif document.kind == "PodMonitor":
        selector = spec.get("selector") or {}
        ports = [str(endpoint["port"]) for endpoint in spec.get("podMetricsEndpoints", []) if "port" in endpoint]
    elif document.kind == "PodDisruptionBudget":
        selector, ports = spec.get("selector") or {}, []
        if not isinstance(spec.get("minAvailable"), int):
            yield (
                f"{document}: spec.minAvailable: it has to be a number of pods; a RayCluster has no scale, from which "
                "Kubernetes would know how many there should be"
            )
    else:
        return
    pods = [template for template in templates if _matches(selector, template.labels)]
    if not pods:
        yield f"{document}: spec.selector: no pod has the labels {selector}"
    for port in ports:
        for pod in pods:
            if port not in _pod_ports(pod):
                yield f"{document}: spec.ports: {pod} has no port {port!r}"


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(
        expression.get("operator") != "In" or labels.get(expression.get("key", "")) in expression.get("values", [])
        for expression in selector.get("matchExpressions") or []
    )


def _pod_ports(template: PodTemplate) -> set[str]:
    ports = [port for container in template.containers for port in container.get("ports", [])]
    return {str(port.get("name")) for port in ports} | {str(port.get("containerPort")) for port in ports}
