"""How many pods of which size an overlay has: its GPUs, and room for what its config allows."""

from pathlib import Path

import pytest
import yaml

from cluster.config import load_config, parse_config
from cluster.errors import ConfigError, DoesNotFit
from cluster.kubernetes.manifests import manifests
from cluster.kubernetes.sizes import model_size, pod_groups
from tests.k8s.overlays import RENDERED, REPOSITORY

OVERLAY = {path.name: load_config(path / "manta.yaml") for path in RENDERED}


@pytest.mark.parametrize(
    ("overlay", "role", "pods", "gpus"),
    [
        ("cpu-demo", "expert", (1, 1), 0),
        ("mixtral-8x7b-8gpu", "expert", (8, 16), 1),
        ("mixtral-8x7b-8gpu", "coordinator", (1, 2), 1),
        ("mixtral-8x7b-8gpu", "gateway", (2, 8), 0),
        ("mixtral-8x7b-4x40gb", "expert", (4, 4), 1),
        ("mixtral-1gpu", "coordinator", (1, 1), 1),
        ("autoscaling", "expert", (8, 48), 1),
        ("autoscaling", "coordinator", (1, 6), 1),
    ],
)
def test_pods_of_a_role(overlay: str, role: str, pods: tuple[int, int], gpus: int) -> None:
    group = pod_groups(OVERLAY[overlay])[role]
    assert (group.min_pods, group.max_pods) == pods
    assert group.size.gpus == gpus


def test_roles_without_processes_have_no_pods() -> None:
    assert "coordinator" not in pod_groups(OVERLAY["mixtral-8x7b-4x40gb"])  # it shares a shard's GPU
    assert "expert" not in pod_groups(OVERLAY["mixtral-1gpu"])  # the coordinator has them all


def test_the_volume_holds_the_weights() -> None:
    config = OVERLAY["mixtral-8x7b-8gpu"]
    claim = next(one for one in manifests(config) if one["kind"] == "PersistentVolumeClaim")
    gib = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert model_size(config.models[0]).weight_bytes == 2 * 46_702_792_704  # Mixtral 8x7B's parameters, in bfloat16
    assert gib * 2**30 > 1.2 * model_size(config.models[0]).weight_bytes


def test_a_revision_is_what_the_job_fetches_the_pods_wait_for_and_the_cluster_opens() -> None:
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/mixtral-8x7b-8gpu/manta.yaml").read_text())
    document["models"][0]["revision"] = "v0.1"
    made = manifests(parse_config(document))
    wanted = f"{document['models'][0]['path']}@v0.1"
    [job] = [one for one in made if one["kind"] == "Job"]
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["manta", "fetch", wanted]
    [service] = [one for one in made if one["kind"] == "RayService"]
    text = yaml.safe_dump(service)
    assert f"- {wanted}\n" in text
    served = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert [one["args"]["model"]["revision"] for one in served[1:]] == ["v0.1"]


def test_a_revision_of_what_is_in_the_image_is_refused() -> None:
    """Manifests were made, and every replica failed by it."""
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/cpu-demo/manta.yaml").read_text())
    document["models"][0]["revision"] = "v1"
    with pytest.raises(ConfigError, match="only a model of the hub has revisions"):
        manifests(parse_config(document))


def test_a_gpu_that_is_too_small_is_refused() -> None:
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/mixtral-8x7b-4x40gb/manta.yaml").read_text())
    document["kubernetes"]["gpu_type"] = "A10G"
    with pytest.raises(DoesNotFit, match=r"'mixtral' on A10G GPUs: coordinator 0 needs 0.1 GPU with 10.99 GiB free"):
        manifests(parse_config(document))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine": {"device": "cpu"}}, "engine.kv_cache_gib: say how much"),
        ({"engine": {"kv_cache_gib": 0.25}}, "engine.device: say cpu or cuda"),
        ({"path": "acme/unknown"}, "its sizes are not known"),
    ],
)
def test_what_only_the_user_knows_is_asked_for(change: dict[str, object], sentence: str) -> None:
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/cpu-demo/manta.yaml").read_text())
    document["models"][0] |= change
    with pytest.raises(ConfigError, match=sentence):
        manifests(parse_config(document))


def test_a_port_of_ones_own_is_refused(tmp_path: Path) -> None:
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/cpu-demo/manta.yaml").read_text())
    document["gateway"]["http_port"] = 8001
    with pytest.raises(ConfigError, match=r"gateway\.http_port: in pods it is 8000"):
        manifests(parse_config(document))
