"""Names of our code that are kept as text: in Serve configs, in manifests, in what our code tells Ray and Serve."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

from tests.k8s.overlays import REPOSITORY
from tests.programs import said_by

PACKAGES = ("cluster", "experts_service", "gateway", "router_service")
# module:attribute, module.Class, module.add_…_to_server: of one that is our own.
PATH = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)*(?::[A-Za-z_]\w*|\.[A-Z]\w+|\.add_\w+)")


def _written_down() -> Iterator[str]:
    for manifest in (REPOSITORY / "k8s").rglob("*.yaml"):
        if manifest.name != "manta.yaml":  # the configuration, which names keys of its own
            yield from PATH.findall(manifest.read_text())
    yield from tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"].values()


def _told_by_code() -> Iterator[str]:
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and PATH.fullmatch(node.value):
                    yield node.value


def test_every_path_that_is_kept_as_text_imports() -> None:
    """A module that moved was found missing by the cluster, or by a RayService that never became ready."""
    written, told = {*_written_down()}, {*_told_by_code()}
    assert written >= {
        "cluster.cli:main",
        "cluster.deploy.serve_config:build_gateway",
        "cluster.deploy.serve_config:build_model",
        "cluster.planning.scaling_policy:ScalingPolicy",
        "gateway.edge.client_headers:middlewares",
    }
    assert told >= {
        "experts_service.membership.ExpertRouter",
        "gateway.coordinators.router.CoordinatorRouter",
        "gateway.grpc.cancellation.add_MantaServicer_to_server",
    }
    assert said_by("cluster.import_paths", *sorted(written | told)) == ""
