"""The overlays of this repository, built by kubectl once per session."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.check.documents import kustomize
from tests.programs import REPOSITORY

OVERLAYS = sorted(path for path in (REPOSITORY / "k8s" / "overlays").iterdir() if path.is_dir())
RENDERED = [path for path in OVERLAYS if (path / "manta.yaml").is_file()]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")


def kuberay_schemas() -> Path | None:
    """The folder with KubeRay's schemas, beside the repository or where MANTA_KUBERAY_SCHEMAS says."""
    given = os.environ.get("MANTA_KUBERAY_SCHEMAS")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "kuberay"
    return folder if folder.is_dir() else None


@functools.cache
def build(overlay: Path) -> tuple[dict[str, Any], ...]:
    """Every document of an overlay."""
    return tuple(yaml.load_all(kustomize(overlay), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def the(overlay: Path, kind: str, name: str | None = None) -> dict[str, Any]:
    """The one document of that kind, or of that kind and name."""
    found = [one for one in build(overlay) if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    assert len(found) == 1, f"{overlay.name} has {len(found)} {kind} {name or ''}"
    return found[0]
