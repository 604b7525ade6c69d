"""How many pods of which size an overlay has: its GPUs, and room for what its config allows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _node_type_from_group_spec

from cluster.config import load_config, parse_config
from cluster.deploy.serve_config import serve_config
from cluster.errors import ConfigError, DoesNotFit
from cluster.kubernetes.manifests import manifests
from cluster.kubernetes.pod_config import in_pods
from cluster.kubernetes.ray_service import ray_service
from cluster.kubernetes.sizes import model_size, pod_groups
from tests.k8s.overlays import RENDERED, REPOSITORY

OVERLAY = {path.name: load_config(path / "manta.yaml") for path in RENDERED}


@pytest.mark.parametrize(
    ("overlay", "role", "pods", "gpus"),
    [
        ("cpu-demo", "expert", (1, 1), 0),
        ("mixtral-8x7b-8gpu", "expert", (8, 16), 1),
        ("mixtral-8x7b-8gpu", "coordinator", (1, 2), 1),
        ("mixtral-8x7b-8gpu", "gateway", (2, 4), 0),
        ("mixtral-8x7b-4x40gb", "expert", (4, 4), 1),
        ("mixtral-1gpu", "coordinator", (1, 1), 1),
        ("mixtral-8x7b-tiers", "expert-gpu", (1, 1), 1),
        ("mixtral-8x7b-tiers", "expert-cpu", (1, 1), 0),
        ("autoscaling", "expert", (8, 48), 1),
        ("autoscaling", "coordinator", (1, 6), 1),
    ],
)
def test_pods_of_a_role(overlay: str, role: str, pods: tuple[int, int], gpus: int) -> None:
    group = pod_groups(OVERLAY[overlay])[role]
    assert (group.min_pods, group.max_pods) == pods
    assert group.size.gpus == gpus


def test_the_autoscaler_knows_of_gpus_whatever_their_resource_is_called() -> None:
    """Of a slice's, it took such pods for ones without a GPU: no shard had a place, and no pod was added."""
    config = OVERLAY["mixtral-8x7b-8gpu"]
    slices = config.kubernetes.model_copy(update={"gpu_resource": "nvidia.com/mig-3g.40gb"})
    for settings in (config.kubernetes, slices):
        cluster = ray_service(config.model_copy(update={"kubernetes": settings}))["spec"]["rayClusterConfig"]
        for group in cluster["workerGroupSpecs"]:
            resources = _node_type_from_group_spec(group, is_head=False)["resources"]
            assert resources.get("GPU", 0) == (0 if group["groupName"] == "gateway" else 1)


def test_pods_with_gpus_go_to_machines_whose_taints_are_named() -> None:
    config = OVERLAY["mixtral-8x7b-8gpu"]
    settings = config.kubernetes.model_copy(update={"gpu_taints": {"sku": "gpu", "team": ""}})
    cluster = ray_service(config.model_copy(update={"kubernetes": settings}))["spec"]["rayClusterConfig"]
    of_groups = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    assert "tolerations" not in of_groups["gateway"]
    for role in ("coordinator", "expert"):
        assert of_groups[role]["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "sku", "operator": "Equal", "value": "gpu"},
            {"key": "team", "operator": "Exists"},
        ]


def test_roles_without_processes_have_no_pods() -> None:
    assert "coordinator" not in pod_groups(OVERLAY["mixtral-8x7b-4x40gb"])  # it shares a shard's GPU
    assert "expert" not in pod_groups(OVERLAY["mixtral-1gpu"])  # the coordinator has them all


def tiered(**experts: object) -> dict[str, object]:
    """The overlay with tiers, its experts otherwise."""
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/mixtral-8x7b-tiers/manta.yaml").read_text())
    document["models"][0]["experts"] |= experts
    return document


def test_pods_with_experts_on_cpus_are_as_large_as_their_format() -> None:
    """Tiers were refused: all pods with experts were alike."""
    groups = pod_groups(OVERLAY["mixtral-8x7b-tiers"])
    assert "coordinator" not in groups, "it shares the GPU"
    assert "expert" not in groups
    gpu, cpu = groups["expert-gpu"], groups["expert-cpu"]
    assert (gpu.labels, cpu.labels) == tuple({"manta/role": "expert", "manta/tier": kind} for kind in ("gpu", "cpu"))
    assert cpu.size.cpus == 16
    assert 7 * 5.33 < cpu.size.memory_mib / 2**10 < 7 * 5.33 + 2.5
    tiers = [{"groups": [0], "device": "cuda", "gpus_per_shard": 0.9}, {"groups": [1], "device": "cpu"}]
    plain = pod_groups(parse_config(tiered(tiers=tiers)))["expert-cpu"]
    assert plain.size.memory_mib - cpu.size.memory_mib == pytest.approx(7 * (10.5 - 5.33) * 2**10, abs=300)


def test_pods_are_as_large_as_what_the_engine_rounds_to() -> None:
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/cpu-demo/manta.yaml").read_text())
    document["models"][0] |= {"path": "mistralai/Mixtral-8x7B-v0.1", "version": "1"}
    document["models"][0]["engine"] |= {"kv_cache_gib": 5}
    engine = document["models"][0]["engine"]
    plain, int4 = (
        pod_groups(parse_config(document | {"models": [document["models"][0] | {"engine": engine | of}]}))
        for of in ({}, {"quantization": "int4"})
    )
    assert int4["expert"].size.memory_mib < 0.3 * plain["expert"].size.memory_mib
    attention = plain["coordinator"].size.memory_mib - int4["coordinator"].size.memory_mib
    assert attention > 1.5 * 2**10, "its projections are rounded as well"


def test_each_set_of_labels_that_tiers_ask_for_has_pods_of_its_own() -> None:
    tiers = [
        {"groups": [0], "device": "cuda", "gpus_per_shard": 0.9},
        {"groups": [1], "device": "cpu", "quantization": "int8", "label_selector": {"memory": "fast"}},
        {"groups": [2], "device": "cpu", "quantization": "int4", "label_selector": {"memory": "slow"}},
    ]
    config = parse_config(tiered(groups=[[0], [1, 2, 3], [4, 5, 6, 7]], tiers=tiers))
    groups = pod_groups(config)
    assert [name for name in groups if name.startswith("expert")] == ["expert-gpu", "expert-cpu", "expert-cpu-2"]
    [service] = [one for one in manifests(config) if one["kind"] == "RayService"]
    workers = {one["groupName"]: one["labels"] for one in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert workers["expert-cpu-2"] == {"manta/role": "expert", "manta/tier": "cpu", "memory": "slow"}
    model = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][1]["args"]["model"]
    asked = [tier["label_selector"] for tier in model["experts"]["tiers"]]
    assert asked[2] == {"manta/tier": "cpu", "memory": "slow"}
    assert model["experts"]["label_selector"] == {"manta/role": "expert"}
    assert model["label_selector"] == {"manta/role": "expert", "manta/tier": "gpu"}
    budgets = {one["metadata"]["name"]: one for one in manifests(config) if one["kind"] == "PodDisruptionBudget"}
    assert "manta-head" in budgets


def test_a_model_without_tiers_beside_one_with_them_finds_its_own_kind() -> None:
    document = tiered()
    whole = document["models"][0] | {
        "name": "whole",
        "aliases": [],
        "experts": {"groups": [[0, 1], [2, 3], [4, 5, 6, 7]]},
    }
    whole["engine"] = {"device": "cpu", "dtype": "bfloat16", "kv_cache_gib": 5}
    config = parse_config(document | {"models": [document["models"][0], whole]})
    [service] = [one for one in manifests(config) if one["kind"] == "RayService"]
    model = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][2]["args"]["model"]
    assert model["experts"]["label_selector"] == {"manta/role": "expert", "manta/tier": "cpu"}
    alone = pod_groups(parse_config(tiered()))["expert-cpu"].size.memory_mib
    assert pod_groups(config)["expert-cpu"].size.memory_mib - alone > 80 * 2**10, "the pods hold both models' shards"


def test_a_gpu_that_is_too_small_for_a_tier_is_refused() -> None:
    tiers = [{"groups": [0], "device": "cuda", "gpus_per_shard": 0.9}, {"device": "cpu", "quantization": "int8"}]
    document = tiered(groups=[[0, 1, 2], [3, 4, 5, 6, 7]], tiers=tiers)
    with pytest.raises(DoesNotFit, match=r"'mixtral' on L4 GPUs: expert group 0 needs 0\.9 GPU with 31\.53 GiB free"):
        manifests(parse_config(document))
    document["models"][0]["engine"] |= {"device": "cpu"}  # the coordinator is not there, the shard is
    with pytest.raises(DoesNotFit, match=r"expert group 0 needs 0\.9 GPU"):
        manifests(parse_config(document))


def test_the_volume_holds_the_weights() -> None:
    config = OVERLAY["mixtral-8x7b-8gpu"]
    claim = next(one for one in manifests(config) if one["kind"] == "PersistentVolumeClaim")
    gib = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert model_size(config.models[0]).weight_bytes == 2 * 46_702_792_704  # Mixtral 8x7B's parameters, in bfloat16
    assert gib * 2**30 > 1.2 * model_size(config.models[0]).weight_bytes


def _volume_gib(document: dict[str, Any]) -> int:
    [claim] = [one for one in manifests(parse_config(document)) if one["kind"] == "PersistentVolumeClaim"]
    return int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))


def test_after_a_roll_the_volume_need_not_shrink() -> None:
    """Kubernetes refuses a smaller claim, so that the apply which takes the old version out failed."""
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/mixtral-8x7b-8gpu/manta.yaml").read_text())
    [old] = document["models"]
    document["models"] = [{**old, "version": "next", "revision": "next"}, old]
    while_it_rolls = _volume_gib(document)
    document["models"].pop()
    assert _volume_gib(document) < while_it_rolls
    document["kubernetes"]["model_volume_gib"] = while_it_rolls
    assert _volume_gib(document) == while_it_rolls
    document["kubernetes"]["model_volume_gib"] = 80
    with pytest.raises(ConfigError, match="model_volume_gib: 80, and the models take 87"):
        manifests(parse_config(document))


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


def test_more_gateways_make_more_pods_and_bodies_of_both_doors_have_room() -> None:
    """They reserved nothing: eight of them were put into two pods, which ran out of memory when bodies filled them."""
    document = yaml.safe_load((REPOSITORY / "k8s/overlays/cpu-demo/manta.yaml").read_text())
    document["gateway"] = {"scaling": {"min_replicas": 2, "max_replicas": 8}, "max_bytes_received": 2**30}
    document["kubernetes"]["gateway_cpus"] = 3
    config = parse_config(document)
    reserved = in_pods(config).gateway.num_cpus
    group = pod_groups(config)["gateway"]
    assert (group.min_pods, group.max_pods) == (2, 8)
    assert 2 * reserved == group.size.cpus, "a pod has room for one gateway, and for the one that is to follow it"
    [gateway] = [one for one in serve_config(in_pods(config))["applications"] if one["name"] == "gateway"]
    assert gateway["args"]["gateway"]["num_cpus"] == 1.5
    assert group.size.memory_mib > 2 * 2 * 1024, "two gateways, each with what HTTP and gRPC may hold"
