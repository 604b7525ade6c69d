"""Kubernetes documents, read from YAML files or built from kustomize directories by kubectl. Judges nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.yaml_document import parse_manifests

KUSTOMIZE_TIMEOUT_S = 60
KUSTOMIZATION = ("kustomization.yaml", "kustomization.yml", "Kustomization")


@dataclass(frozen=True, slots=True)
class Document:
    """One Kubernetes object, as it was written."""

    source: str  # the file or directory that it is from
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", ""))

    @property
    def name(self) -> str:
        metadata = self.body.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    def __str__(self) -> str:
        return f"{self.source}: {self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """A pod that some document asks for."""

    owner: Document
    field: str  # where it is in there
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Those that start first, too."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    def __str__(self) -> str:
        return f"{self.owner}: {self.field}"


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Of files, of kustomize directories, and of directories with YAML files. Raises ConfigError."""
    documents = [document for path in paths for document in _read(path)]
    if not documents:
        raise ConfigError(f"there are no Kubernetes documents in {', '.join(map(str, paths))}")
    return documents


def kustomize(directory: Path) -> str:
    """What `kubectl kustomize` makes of a directory. Raises ConfigError with its message."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ConfigError(f"{directory} is built by kubectl (1.21 or newer), which is not on the PATH")
    done = subprocess.run(
        [kubectl, "kustomize", str(directory)],
        capture_output=True,
        text=True,
        timeout=KUSTOMIZE_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"{directory}: kubectl kustomize: {done.stderr.strip()}")
    return done.stdout


def pod_templates(documents: Sequence[Document]) -> Iterator[PodTemplate]:
    """Every pod that the documents ask for: of a Ray cluster's groups, of Jobs and of what else has a template."""
    for document in documents:
        spec = document.body.get("spec") or {}
        if document.kind in ("RayService", "RayCluster"):
            field = "spec.rayClusterConfig." if document.kind == "RayService" else "spec."
            cluster = spec.get("rayClusterConfig", {}) if document.kind == "RayService" else spec
            groups = [("headGroupSpec", cluster.get("headGroupSpec", {}))]
            groups += [(f"workerGroupSpecs[{i}]", one) for i, one in enumerate(cluster.get("workerGroupSpecs", []))]
            for name, group in groups:
                labels = group.get("labels") or {}
                yield _template(document, f"{field}{name}.template", group.get("template") or {}, labels)
        elif isinstance(spec, dict) and "template" in spec:
            yield _template(document, "spec.template", spec["template"], {})


def _template(owner: Document, field: str, template: dict[str, Any], labels: dict[str, str]) -> PodTemplate:
    own = (template.get("metadata") or {}).get("labels") or {}
    return PodTemplate(owner, field, {**own, **labels}, template.get("spec") or {})


def _read(path: Path) -> Iterator[Document]:
    if path.is_dir():
        if any((path / name).is_file() for name in KUSTOMIZATION):
            yield from _parse(kustomize(path), str(path))
            return
        for file in sorted((*path.glob("*.yaml"), *path.glob("*.yml"))):
            yield from _read(file)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8") from error
    yield from _parse(text, str(path))


def _parse(text: str, source: str) -> Iterator[Document]:
    for number, body in enumerate(parse_manifests(text, source), start=1):
        if body is None:
            continue
        if not isinstance(body, dict) or not body.get("kind") or not body.get("apiVersion"):
            raise ConfigError(f"{source}: document {number} is no Kubernetes object: it needs apiVersion and kind")
        yield Document(source, body)
