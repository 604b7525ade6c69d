"""Each rule of `manta k8s check`: the demo's manifests with one thing broken, and the sentence that says so."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import ConfigError
from cluster.kubernetes.check.documents import Document, read_documents
from cluster.kubernetes.check.problems import problems
from cluster.kubernetes.check.quantities import parse_quantity
from tests.k8s.overlays import REPOSITORY, build, needs_kubectl, the

DEMO = REPOSITORY / "k8s" / "overlays" / "cpu-demo"

pytestmark = needs_kubectl


def _broken(break_it: Callable[[dict[str, Any]], object]) -> list[str]:
    """Problems of the demo after a change of its RayService."""
    documents = [copy.deepcopy(document) for document in build(DEMO)]
    break_it(next(document for document in documents if document["kind"] == "RayService"))
    return list(problems([Document("demo", document) for document in documents]))


def _cluster(service: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return config


def _workers(service: dict[str, Any], name: str) -> dict[str, Any]:
    return next(group for group in _cluster(service)["workerGroupSpecs"] if group["groupName"] == name)


def _container(service: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = _workers(service, "expert")["template"]["spec"]["containers"][0]
    return container


def _serve(service: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    change(config)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "long name": (lambda s: s["metadata"].update(name="m" * 48), "metadata.name: 48 characters"),
    "name with a dot": (lambda s: s["metadata"].update(name="a.b"), "metadata.name: 'a.b' is not of small letters"),
    "labels to ray start": (
        lambda s: _workers(s, "expert")["rayStartParams"].update(labels="a=b"),
        "rayStartParams.labels: the operator refuses it",
    ),
    "resources twice": (
        lambda s: _cluster(s)["headGroupSpec"].update(resources={"CPU": "0"}),
        "headGroupSpec.resources: the operator refuses it beside rayStartParams.num-cpus",
    ),
    "label syntax": (lambda s: _workers(s, "expert")["labels"].update({"-a": "b"}), "-a: b is no Kubernetes label"),
    "old Ray": (lambda s: _cluster(s).update(rayVersion="2.51.1"), "rayVersion: '2.51.1'; authOptions needs 2.52.0"),
    "no token": (lambda s: _cluster(s).pop("authOptions"), "authOptions.mode: it has to be token"),
    "restart": (
        lambda s: _workers(s, "expert")["template"]["spec"].update(restartPolicy="Always"),
        "workerGroupSpecs[2].template.spec.restartPolicy: 'Always'; with autoscaler v2 it is Never",
    ),
    "replicas": (lambda s: _workers(s, "expert").update(replicas=9), "replicas: 9 is not within 1 and 1"),
    "no maximum": (lambda s: _workers(s, "expert").pop("maxReplicas"), "minReplicas and maxReplicas have both"),
    "upgrade": (
        lambda s: s["spec"].update(upgradeStrategy={"type": "Blue"}),
        "upgradeStrategy.type: 'Blue' is none of",
    ),
    "Serve configuration with a number that is none": (
        lambda s: s["spec"].update(serveConfigV2='applications: []\nport: !!int "abc"'),
        "spec.serveConfigV2: the text, line 2: a value that is not what its tag says",
    ),
    "same group": (
        lambda s: _workers(s, "expert").update(groupName="gateway"),
        "workerGroupSpecs: 2 entries have the groupName 'gateway'",
    ),
    "same variable": (lambda s: _container(s)["env"].append(_container(s)["env"][0]), "entries have the name 'HOME'"),
    "same mount": (
        lambda s: _container(s)["volumeMounts"].append({"name": "home", "mountPath": "/tmp"}),
        "volumeMounts: 2 entries have the mountPath '/tmp'",
    ),
    "same port": (
        lambda s: _container(s)["ports"].append({"name": "other", "containerPort": 8000}),
        "ports: 2 entries have the containerPort 8000, protocol 'TCP'",
    ),
    "quantity": (
        lambda s: _container(s)["resources"]["limits"].update(memory="2 GB"),
        "resources.limits.memory: '2 GB' is no quantity",
    ),
    "request above limit": (
        lambda s: _container(s)["resources"]["requests"].update(cpu="64"),
        "resources.requests.cpu: 64 is more than the limit",
    ),
    "unknown mount": (
        lambda s: _container(s)["volumeMounts"].append({"name": "models", "mountPath": "/models"}),
        "container 'ray-worker' mounts 'models', which is no volume",
    ),
    "unknown Secret": (
        lambda s: _workers(s, "expert")["template"]["spec"]["volumes"].append(
            {"name": "x", "secret": {"secretName": "nowhere"}}
        ),
        "volumes[x]: there is no Secret 'nowhere'",
    ),
    "unknown claim": (
        lambda s: _workers(s, "expert")["template"]["spec"]["volumes"].append(
            {"name": "x", "persistentVolumeClaim": {"claimName": "nowhere"}}
        ),
        "volumes[x]: there is no PersistentVolumeClaim 'nowhere'",
    ),
    "unknown account": (
        lambda s: _workers(s, "expert")["template"]["spec"].update(serviceAccountName="nobody"),
        "serviceAccountName: there is no ServiceAccount 'nobody'",
    ),
    "unknown priority": (
        lambda s: _workers(s, "expert")["template"]["spec"].update(priorityClassName="high"),
        "priorityClassName: there is no PriorityClass 'high'",
    ),
    "unknown token": (
        lambda s: _cluster(s)["authOptions"].update(secretName="nowhere"),
        "authOptions.secretName: there is no Secret 'nowhere'",
    ),
    "tag": (lambda s: _container(s).update(image="acme/manta:1"), "the image 'acme/manta:1' has no digest"),
    "labels that no group has": (
        lambda s: _workers(s, "expert")["labels"].update({"manta/role": "expertise"}),
        "experts.label_selector: no worker group has the labels manta/role: expert",
    ),
    "service without pods": (
        lambda s: (_workers(s, "gateway")["labels"].clear(), _workers(s, "gateway")["template"].pop("metadata")),
        "Service/manta: spec.selector: no pod has the labels",
    ),
    "no Serve config": (lambda s: s["spec"].pop("serveConfigV2"), "spec.serveConfigV2: there is none"),
    "Serve config of another form": (
        lambda s: _serve(s, lambda config: config["applications"][0].update(rout_prefix="/")),
        "spec.serveConfigV2: applications.0.rout_prefix: Serve knows no such key",
    ),
    "Serve config with another type": (
        lambda s: _serve(s, lambda config: config["applications"][0].update(import_path=3)),
        "spec.serveConfigV2: applications.0.import_path: Input should be a valid string",
    ),
    "another port": (
        lambda s: _serve(s, lambda config: config["http_options"].update(port=8080)),
        "serveConfigV2.http_options.port: 8080, and the containers' port 'serve' is 8000",
    ),
    "loopback": (
        lambda s: _serve(s, lambda config: config["http_options"].update(host="127.0.0.1")),
        "http_options.host: '127.0.0.1' cannot be reached from another pod",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_thing_broken(case: str) -> None:
    break_it, sentence = BROKEN[case]
    found = _broken(break_it)
    assert any(sentence in problem for problem in found), found


def test_nothing_broken() -> None:
    assert _broken(lambda service: None) == []


def test_budgets_are_numbers_of_pods() -> None:
    budget = copy.deepcopy(the(DEMO, "PodDisruptionBudget", "manta-head"))
    budget["spec"] = {"maxUnavailable": 1, "selector": budget["spec"]["selector"]}
    found = list(problems([Document("demo", document) for document in (*build(DEMO), budget)]))
    assert any("spec.minAvailable: it has to be a number of pods" in problem for problem in found)


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", "0.5"), ("2", "2"), ("1.5Gi", str(3 * 2**29)), ("1e3", "1000"), ("3M", "3000000"), (".5", "0.5")],
)
def test_quantities(text: str, value: str) -> None:
    assert str(parse_quantity(text).normalize().__format__("f")) == value  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["2 GB", "1GiB", "", "m", "1.2.3", "5Kb"])
def test_no_quantities(text: str) -> None:
    assert parse_quantity(text) is None


class TestCommand:
    def test_a_kustomize_directory(self) -> None:
        result = CliRunner().invoke(app, ["k8s", "check", str(DEMO)])
        assert result.exit_code == 0, result.output
        assert "no problem found" in result.output

    def test_rendered_alone(self) -> None:
        """What `k8s/base` holds is taken to be there: the file need not name it."""
        result = CliRunner().invoke(app, ["k8s", "check", str(DEMO / "rendered.yaml")])
        assert [line for line in result.output.splitlines() if "has no digest" not in line] == [], result.output

    def test_problems_are_exit_code_1(self, tmp_path: Path) -> None:
        file = tmp_path / "service.yaml"
        file.write_text("{apiVersion: ray.io/v1, kind: RayService, metadata: {name: UPPER}, spec: {}}")
        result = CliRunner().invoke(app, ["k8s", "check", str(file)])
        assert result.exit_code == 1
        assert f"{file}: RayService/UPPER: metadata.name" in result.output

    @pytest.mark.parametrize("text", ["a: [", "just text", "{kind: Pod}"])
    def test_what_is_no_manifest(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "broken.yaml"
        file.write_text(text)
        result = CliRunner().invoke(app, ["k8s", "check", str(file)])
        assert result.exit_code == 1
        assert type(result.exception).__name__ == "ConfigError"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (b'a: 1\n---\nb: !!int "abc"', "line 3: a value that is not what its tag says"),
            (b"a: 1\nb: 2026-99-99", "line 2: a value that is not what its tag says"),
            (b"a: 1\n---\nb: [", "line 3: not YAML"),
            (b"a: \xff", "is not UTF-8"),
        ],
    )
    def test_what_yaml_cannot_read_is_told_by_its_line(self, tmp_path: Path, text: bytes, words: str) -> None:
        """A number that was none was a stack trace, for PyYAML leaves it to `int`."""
        file = tmp_path / "broken.yaml"
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=words):
            read_documents([file])
