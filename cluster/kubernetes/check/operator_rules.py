"""What KubeRay's operator refuses beyond its schema, read in its version 1.7."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.kubernetes.check.documents import Document

MAX_NAME = 47
MIN_RAY_FOR_TOKENS = (2, 52)

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_REDIS_VARIABLES = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")


def operator_problems(document: Document) -> Iterator[str]:
    """Of a RayService or a RayCluster."""
    if document.kind not in ("RayService", "RayCluster"):
        return
    name, spec = document.name, document.body.get("spec") or {}
    if len(name) > MAX_NAME:
        yield f"{document}: metadata.name: {len(name)} characters; the operator takes at most {MAX_NAME}"
    if not _DNS_1035.fullmatch(name):
        yield f"{document}: metadata.name: {name!r} is not of small letters, digits and dashes, beginning with a letter"
    cluster, field = spec, "spec"
    if document.kind == "RayService":
        cluster, field = spec.get("rayClusterConfig") or {}, "spec.rayClusterConfig"
        yield from _upgrade(document, spec, cluster)
    groups = [("headGroupSpec", cluster.get("headGroupSpec") or {})]
    groups += [(f"workerGroupSpecs[{i}]", one) for i, one in enumerate(cluster.get("workerGroupSpecs") or [])]
    for part, group in groups:
        yield from _group(document, f"{field}.{part}", group)
    yield from _autoscaler(document, field, cluster, groups)
    yield from _auth(document, field, cluster)
    yield from _fault_tolerance(document, field, cluster)


def _upgrade(document: Document, spec: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy") or {}
    kind = strategy.get("type", "NewCluster")
    if kind not in _UPGRADES:
        yield f"{document}: spec.upgradeStrategy.type: {kind!r} is none of {', '.join(_UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        if not cluster.get("enableInTreeAutoscaling"):
            yield f"{document}: spec.upgradeStrategy.type: {kind} needs enableInTreeAutoscaling"
        if not strategy.get("clusterUpgradeOptions"):
            yield f"{document}: spec.upgradeStrategy.clusterUpgradeOptions: {kind} needs it"


def _group(document: Document, field: str, group: dict[str, Any]) -> Iterator[str]:
    start = group.get("rayStartParams") or {}
    if "labels" in start:
        yield f"{document}: {field}.rayStartParams.labels: the operator refuses it; say {field}.labels"
    if group.get("resources") and (both := [name for name in _START_RESOURCES if start.get(name)]):
        yield f"{document}: {field}.resources: the operator refuses it beside rayStartParams.{both[0]}"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(str(value)):
            yield f"{document}: {field}.labels: {key}: {value} is no Kubernetes label"
    if not ((group.get("template") or {}).get("spec") or {}).get("containers"):
        yield f"{document}: {field}.template.spec.containers: there is none"
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if field.endswith("]"):
        if least is None or most is None:
            yield f"{document}: {field}: minReplicas and maxReplicas have both to be there"
        elif not least <= group.get("replicas", least) <= most:
            yield f"{document}: {field}.replicas: {group.get('replicas')} is not within {least} and {most}"


def _autoscaler(
    document: Document, field: str, cluster: dict[str, Any], groups: list[tuple[str, dict[str, Any]]]
) -> Iterator[str]:
    options = cluster.get("autoscalerOptions") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        if options:
            yield f"{document}: {field}.autoscalerOptions: nothing reads them without enableInTreeAutoscaling"
        return
    if options.get("version") != "v2":
        return
    for part, group in groups:
        policy = ((group.get("template") or {}).get("spec") or {}).get("restartPolicy", "")
        if policy not in ("", "Never"):
            yield (
                f"{document}: {field}.{part}.template.spec.restartPolicy: {policy!r}; with autoscaler v2 it is Never "
                "or not there"
            )


def _auth(document: Document, field: str, cluster: dict[str, Any]) -> Iterator[str]:
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield f"{document}: {field}.authOptions.mode: it has to be token; without, who reaches a port of Ray runs code"
        return
    version = str(cluster.get("rayVersion", ""))
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MIN_RAY_FOR_TOKENS:
        yield f"{document}: {field}.rayVersion: {version!r}; authOptions needs 2.52.0 or newer"


def _fault_tolerance(document: Document, field: str, cluster: dict[str, Any]) -> Iterator[str]:
    head = cluster.get("headGroupSpec") or {}
    containers = ((head.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    variables = {one.get("name") for one in containers[0].get("env") or []}
    for name in _REDIS_VARIABLES:
        if name in variables:
            yield f"{document}: {field}.headGroupSpec: the variable {name} is refused; say gcsFaultToleranceOptions"
    for name in ("redis-password", "redis-username"):
        if (head.get("rayStartParams") or {}).get(name):
            yield f"{document}: {field}.headGroupSpec.rayStartParams.{name}: say it in gcsFaultToleranceOptions"
