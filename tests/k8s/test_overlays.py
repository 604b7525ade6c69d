"""Every overlay is what its manta.yaml renders to, builds with kubectl alone, and passes the schemas of its kinds."""

import functools
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config import load_config
from cluster.deploy.serve_config import GatewayArguments, ModelApplicationArguments
from cluster.kubernetes.check.documents import read_documents
from cluster.kubernetes.check.problems import problems
from cluster.kubernetes.manifests import render
from cluster.kubernetes.names import head_service
from tests.k8s.overlays import OVERLAYS, RENDERED, build, kuberay_schemas, needs_kubectl, the

# Fields that a kustomization may have: those of the kustomize in kubectl 1.21, and no components.
KUSTOMIZE_1_21 = {"apiVersion", "kind", "namespace", "resources", "patches", "images", "configMapGenerator"}
CUSTOM_KINDS = {"RayService", "PodMonitor", "PrometheusRule"}  # of operators, not in Kubernetes' own schema


@functools.cache
def _validate(document: str) -> None:
    """Most documents are the same in every overlay."""
    kubernetes_validate.validate(json.loads(document), "1.37", strict=True)


each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


@pytest.mark.parametrize("overlay", RENDERED, ids=lambda path: path.name)
def test_committed_is_what_is_rendered(overlay: Path) -> None:
    rendered = render(load_config(overlay / "manta.yaml"))
    assert (overlay / "rendered.yaml").read_text() == rendered, (
        f"run: manta k8s render --config {overlay / 'manta.yaml'} > {overlay / 'rendered.yaml'}"
    )


@pytest.mark.parametrize(
    ("ray_service", "expected"),
    [
        ("manta", "manta-head-svc"),
        ("m" * 47, f"{'m' * 41}-head-svc"),
        (f"{'m' * 5}-{'m' * 40}", f"r{'m' * 40}-head-svc"),
    ],
)
def test_the_head_service_has_kuberays_name(ray_service: str, expected: str) -> None:
    """Of a long one KubeRay keeps the last 50 characters, and its names begin with a letter."""
    assert head_service(ray_service) == expected


@pytest.mark.parametrize("file", sorted(OVERLAYS[0].parents[1].rglob("kustomization.yaml")), ids=str)
def test_plain_kustomize(file: Path) -> None:
    fields = set(yaml.safe_load(file.read_text()))
    assert fields <= KUSTOMIZE_1_21 | {"generatorOptions"}


@needs_kubectl
@each_overlay
def test_kubernetes_takes_every_document(overlay: Path) -> None:
    kinds = set()
    for document in build(overlay):
        kinds.add(document["kind"])
        if document["kind"] not in CUSTOM_KINDS:
            _validate(json.dumps(document))
    assert {"RayService", "Service", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass", "Job"} <= kinds


@needs_kubectl
@each_overlay
def test_kuberay_takes_the_ray_service(overlay: Path) -> None:
    schemas = kuberay_schemas()
    if schemas is None:
        pytest.skip("KubeRay's schemas are not beside the repository (../shared/kuberay)")
    for kind in ("RayService", "RayCluster"):
        schema = json.loads((schemas / f"{kind.lower()}s.v1.strict.schema.json").read_text())
        jsonschema.Draft7Validator.check_schema(schema)
        for document in build(overlay):
            if document["kind"] == "RayService":
                if kind == "RayCluster":
                    document = {
                        "apiVersion": "ray.io/v1",
                        "kind": kind,
                        "metadata": document["metadata"],
                        "spec": document["spec"]["rayClusterConfig"],
                    }
                errors = list(jsonschema.Draft7Validator(schema).iter_errors(document))
                assert not errors, [f"{list(error.path)}: {error.message}" for error in errors]


@needs_kubectl
@each_overlay
def test_check_finds_only_the_placeholder_of_the_image(overlay: Path) -> None:
    found = list(problems(read_documents([overlay])))
    if overlay.name == "cpu-demo":  # its image is built here, and never pulled
        assert not found
    else:
        assert found
        assert all("has no digest" in problem and "registry.example/" in problem for problem in found), found


@needs_kubectl
@each_overlay
def test_the_builders_take_their_arguments(overlay: Path) -> None:
    """They run on the cluster, so that a wrong argument would show there first."""
    document = yaml.safe_load(the(overlay, "RayService")["spec"]["serveConfigV2"])
    gateway, *models = document["applications"]
    assert gateway["import_path"] == "cluster.deploy.serve_config:build_gateway"
    doors = GatewayArguments.model_validate(gateway["args"])
    assert doors.gateway.host == "0.0.0.0"
    assert doors.gateway.api_keys_file is not None
    for application in models:
        assert application["import_path"] == "cluster.deploy.serve_config:build_model"
        arguments = ModelApplicationArguments.model_validate(application["args"])
        assert arguments.model in [one.model for one in doors.models]
        assert application["name"] == f"{arguments.model.name}-{arguments.model.version}"
