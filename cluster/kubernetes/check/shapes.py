"""Of which shape the parts of documents are that the rules read. Knows fields and their types; judges no value.

A rule may take for granted what is here, and that nothing is null: Kubernetes takes that for not being there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from cluster.errors import ConfigError
from cluster.kubernetes.check.documents import Document
from cluster.yaml_document import MAX_MANIFEST_DEPTH

MAX_VALUES = 200_000  # of one document: a few lines of aliases can stand for billions

# A type; a list whose entries are of one shape; or a mapping of texts, in which the named keys have theirs.
Shape = type | list[Any] | Mapping[str, Any]
ANY_KEY = "*"

TEXTS: Shape = {ANY_KEY: str}
_CONTAINER: Shape = {
    "name": str,
    "image": str,
    "env": [{"name": str, "valueFrom": {"secretKeyRef": {"name": str}}}],
    "ports": [{"name": str, "containerPort": int}],
    "volumeMounts": [{"name": str}],
}
_SOURCE: dict[str, Shape] = {
    "persistentVolumeClaim": {"claimName": str},
    "secret": {"secretName": str, "name": str},
    "configMap": {"name": str},
}
_POD: Shape = {
    "metadata": {"labels": TEXTS},
    "spec": {
        "serviceAccountName": str,
        "priorityClassName": str,
        "initContainers": [_CONTAINER],
        "containers": [_CONTAINER],
        "volumes": [{"name": str, "projected": {"sources": [_SOURCE]}, **_SOURCE}],
    },
}
_GROUP: Shape = {
    "rayStartParams": TEXTS,
    "labels": TEXTS,
    "minReplicas": int,
    "maxReplicas": int,
    "replicas": int,
    "template": _POD,
}
_CLUSTER: Shape = {
    "authOptions": {"secretName": str},
    "autoscalerOptions": {},
    "headGroupSpec": _GROUP,
    "workerGroupSpecs": [_GROUP],
}
_SELECTOR: Shape = {"matchLabels": TEXTS, "matchExpressions": [{"key": str, "values": [str]}]}
_SPECS: dict[str, Shape] = {
    "RayService": {"rayClusterConfig": _CLUSTER, "upgradeStrategy": {}},
    "RayCluster": _CLUSTER,
    "Service": {"selector": TEXTS, "ports": [{}]},
    "PodMonitor": {"selector": _SELECTOR, "podMetricsEndpoints": [{}]},
    "PodDisruptionBudget": {"selector": _SELECTOR},
}
_OTHER_SPEC: Shape = {"template": _POD, "volumeClaimTemplates": [{"metadata": {"name": str}}]}

_WORDS = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}


def without_nulls(document: Document) -> Document:
    """The same without the entries that are null. Raises ConfigError for one that is too large to be looked through."""
    num_values = 0

    def copied(node: Any, depth: int) -> Any:
        nonlocal num_values
        num_values += 1
        if depth > MAX_MANIFEST_DEPTH + 1 or num_values > MAX_VALUES:
            raise ConfigError(
                f"{document}: more than {MAX_VALUES} values, or nested more than {MAX_MANIFEST_DEPTH} deep"
            )
        if isinstance(node, dict):
            return {key: copied(value, depth + 1) for key, value in node.items() if value is not None}
        if isinstance(node, list):
            return [copied(value, depth + 1) for value in node]
        return node

    return replace(document, body=copied(document.body, 1))


def shape_problems(document: Document) -> Iterator[str]:
    """Parts that are not what the rules will take them for, by their paths."""
    shape = {"metadata": {"name": str}, "spec": _SPECS.get(document.kind, _OTHER_SPEC)}
    if document.kind not in _SPECS and not isinstance(document.body.get("spec"), dict):
        del shape["spec"]  # what it is depends on the kind, which no rule reads
    for problem in misshapen(document.body, shape):
        yield f"{document}: {problem}"


def misshapen(node: Any, shape: Shape, path: str = "") -> Iterator[str]:
    """What is not of its shape, each with its path."""
    if isinstance(shape, list) and isinstance(node, list):
        for index, entry in enumerate(node):
            yield from misshapen(entry, shape[0], f"{path}[{index}]")
    elif isinstance(shape, Mapping) and isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}".lstrip(".")
            if not isinstance(key, str):
                yield f"{here}: a key has to be a text"
            elif (of_value := shape.get(key, shape.get(ANY_KEY))) is not None:
                yield from misshapen(value, of_value, here)
    elif not isinstance(shape, type) or not isinstance(node, shape) or (shape is int and isinstance(node, bool)):
        wanted = shape if isinstance(shape, type) else list if isinstance(shape, list) else dict
        found = "null" if node is None else _WORDS.get(type(node), f"a {type(node).__name__}")
        yield f"{path or 'it'}: has to be {_WORDS[wanted]}, and is {found}"
