"""What the pods of every overlay may do, and how long they get to stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import HTTPOptions

from cluster.kubernetes.check.documents import PodTemplate, pod_templates, read_documents
from cluster.kubernetes.check.quantities import parse_quantity
from cluster.ray_variables import ACTIVE_HEAD
from gateway.active_cluster import LOOK_TIMEOUT_S
from gateway.http.authentication import READY_PATH
from tests.k8s.overlays import OVERLAYS, build, needs_kubectl, the

pytestmark = [needs_kubectl, pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)]


def _templates(overlay: Path) -> Iterator[PodTemplate]:
    return pod_templates(read_documents([overlay]))


def _cluster(overlay: Path) -> dict[str, Any]:
    config: dict[str, Any] = the(overlay, "RayService")["spec"]["rayClusterConfig"]
    return config


def test_nobody_is_root_or_can_become_it(overlay: Path) -> None:
    for template in _templates(overlay):
        pod = template.spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        autoscaler = [_cluster(overlay)["autoscalerOptions"]] if template.labels.get("manta/role") == "head" else []
        for container in (*template.containers, *autoscaler):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own["readOnlyRootFilesystem"] is True
            assert own["runAsUser"] >= 10000


def test_only_who_asks_the_api_server_has_a_token(overlay: Path) -> None:
    for template in _templates(overlay):
        automatic = template.spec["automountServiceAccountToken"]
        assert automatic is (template.labels.get("manta/job") == "secrets")
        tokens = [
            volume["name"]
            for volume in template.spec["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
            if "serviceAccountToken" in source
        ]
        assert tokens == (["api-access"] if template.labels.get("manta/role") == "head" else [])
        for container in template.containers:  # the autoscaler's container mounts it, and no other
            assert "api-access" not in [mount["name"] for mount in container["volumeMounts"]]


def test_shared_memory_is_sized_for_the_object_store(overlay: Path) -> None:
    cluster = _cluster(overlay)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        store = int(group["rayStartParams"]["object-store-memory"])
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        shared = volumes["shared-mem"]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert store < int(shared["sizeLimit"].removesuffix("Mi")) * 2**20


def test_pods_get_longer_to_stop_than_the_longest_stream_takes(overlay: Path) -> None:
    spec = the(overlay, "RayService")["spec"]
    longest = yaml.safe_load(spec["serveConfigV2"])["http_options"]["request_timeout_s"]
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        drain_s = int(command[command.index("--timeout") + 1])
        assert longest < drain_s < pod["terminationGracePeriodSeconds"]
        variables = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        late = longest + HTTPOptions().keep_alive_timeout_s  # begun on a connection that an old HAProxy kept
        assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > late


def test_loading_is_not_taken_for_broken(overlay: Path) -> None:
    config = yaml.safe_load(the(overlay, "RayService")["spec"]["serveConfigV2"])
    load_s = max(
        application["args"]["model"].get("experts", {}).get("load_timeout_s", 1800.0)
        for application in config["applications"]
        if "model" in application["args"]
    )
    for group in _cluster(overlay)["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert liveness["httpGet"]["path"] == "/api/healthz"  # Ray's node, whatever is being loaded on it
        if group["groupName"] == "gateway":
            assert startup["httpGet"]["path"] == "/health"
            assert startup["failureThreshold"] * startup["periodSeconds"] > load_s


def test_requests_follow_the_active_cluster(overlay: Path) -> None:
    """The Service asks all gateways that are ready, of both clusters of an upgrade; the probe knows which is active."""
    service, ray_service = the(overlay, "Service", "manta"), the(overlay, "RayService")
    for group in (_cluster(overlay)["headGroupSpec"], *_cluster(overlay)["workerGroupSpecs"]):
        pod = group["template"]
        container = pod["spec"]["containers"][0]
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert variables[ACTIVE_HEAD] == f"{ray_service['metadata']['name']}-head-svc"
        is_asked = service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        probe = container["readinessProbe"]
        assert (probe["httpGet"] == {"path": READY_PATH, "port": 8000}) == is_asked
        assert not is_asked or probe["failureThreshold"] * probe["periodSeconds"] <= 10
        assert probe["timeoutSeconds"] > LOOK_TIMEOUT_S


def test_a_gpu_pod_has_one_gpu_and_no_work_is_on_the_head(overlay: Path) -> None:
    cluster = _cluster(overlay)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        on_gpu = overlay.name != "cpu-demo" and group["groupName"] not in ("gateway", "expert-cpu")
        assert limits.get("nvidia.com/gpu") == ("1" if on_gpu else None)


def test_every_secret_is_a_file(overlay: Path) -> None:
    assert "Secret" not in {document["kind"] for document in build(overlay)}  # none is committed
    for template in _templates(overlay):
        for container in template.containers:
            assert not [one for one in container.get("env", []) if "secretKeyRef" in one.get("valueFrom", {})]


def test_all_that_is_written_to_disk_is_bounded_below_what_the_pod_may_use(overlay: Path) -> None:
    """KubeRay adds a volume without a bound at /tmp/ray, unless something is mounted there."""
    cluster = _cluster(overlay)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        limit = parse_quantity(pod["containers"][0]["resources"]["limits"]["ephemeral-storage"])
        on_disk = [
            one["emptyDir"] for one in pod["volumes"] if one.get("emptyDir", {"medium": "Memory"}).get("medium") is None
        ]
        assert len(on_disk) == 2
        assert sum(parse_quantity(one["sizeLimit"]) or 0 for one in on_disk) < (limit or 0)
    for mounts in (
        cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"],
        cluster["autoscalerOptions"]["volumeMounts"],
    ):
        assert {"name": "tmp", "mountPath": "/tmp/ray", "subPath": "ray"} in mounts
