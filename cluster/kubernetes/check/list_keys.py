"""Lists that Kubernetes keeps as maps: a key that is there twice is refused by the API server, or silently lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.kubernetes.check.documents import Document

_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "workerGroupSpecs": ("groupName",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}


def list_key_problems(document: Document) -> Iterator[str]:
    """Entries of one list with the same key."""
    yield from _walk(document, document.body, "")


def _walk(document: Document, node: Any, field: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{field}.{key}".lstrip(".")
            if isinstance(value, list):
                yield from _doubles(document, key, value, here)
            yield from _walk(document, value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(document, value, f"{field}[{index}]")


def _doubles(document: Document, name: str, entries: list[Any], field: str) -> Iterator[str]:
    entries = [entry for entry in entries if isinstance(entry, dict)]
    keys = _KEYS.get(name)
    if name == "ports":  # of a container, or of a Service
        number = "containerPort" if any("containerPort" in entry for entry in entries) else "port"
        for each in (("name",), (number, "protocol")):
            yield from _same(document, each, [one for one in entries if each[0] in one], field)
    elif keys is not None:
        yield from _same(document, keys, entries, field)


def _same(document: Document, keys: tuple[str, ...], entries: list[dict[str, Any]], field: str) -> Iterator[str]:
    values = [tuple(repr(entry.get(key, "TCP" if key == "protocol" else None)) for key in keys) for entry in entries]
    for value in dict.fromkeys(values):
        if values.count(value) > 1:
            what = ", ".join(f"{key} {part}" for key, part in zip(keys, value, strict=True))
            yield f"{document}: {field}: {values.count(value)} entries have the {what}"
