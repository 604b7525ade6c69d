"""The Serve config of a configuration: what Serve makes of it, and what an edit of it restarts. Nothing is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.config import MantaConfig, parse_config
from cluster.demo_model import DIRECTORY
from cluster.deploy.serve_config import build_gateway, build_model, serve_config
from cluster.errors import CheckpointError, ConfigError

FINGERPRINT = open_checkpoint(DIRECTORY).fingerprint
GROUPS = [[0, 1], [2, 3], [4, 5], [6, 7]]
DEMO: dict[str, Any] = {"name": "demo", "path": "demo", "engine": {"device": "cpu"}, "experts": {"groups": GROUPS}}


def config(*models: dict[str, Any], **gateway: Any) -> MantaConfig:
    return parse_config({"models": models or (DEMO,), "gateway": gateway})


def applications(config: MantaConfig) -> dict[str, ServeApplicationSchema]:
    document = json.loads(json.dumps(serve_config(config)))  # plain data only
    return {application.name: application for application in ServeDeploySchema.model_validate(document).applications}


def test_one_application_has_a_route_and_every_model_version_one_of_its_own() -> None:
    found = applications(config(DEMO, {"name": "a/dense", "path": "demo-dense", "engine": {"device": "cpu"}}))
    demo = f"demo-{FINGERPRINT[:8]}"
    dense = f"a-dense-{open_checkpoint(DIRECTORY / 'dense').fingerprint[:8]}"
    routes = {name: application.route_prefix for name, application in found.items()}
    assert routes == {"gateway": "/", demo: None, dense: None}
    deployments = [one.name for one in found[demo].deployments]
    assert deployments == ["coordinator", "expert-0", "expert-1", "expert-2", "expert-3"]
    assert [one.name for one in found[dense].deployments] == ["coordinator"]


def test_numbers_of_replicas_are_no_reason_to_restart_anything() -> None:
    before = applications(config())
    scaled = DEMO | {"num_coordinators": 2, "experts": {"groups": GROUPS, "group_scaling": {3: {"min_replicas": 2, "max_replicas": 2}}}}  # fmt: skip # noqa: E501
    after = applications(config(scaled, num_replicas=3))
    assert before.keys() == after.keys()
    for name in before:
        assert get_app_code_version(before[name]) == get_app_code_version(after[name])
    numbers = {one.name: one.num_replicas for name in after for one in after[name].deployments}
    assert numbers == {"gateway": 3, "coordinator": 2, "expert-0": 1, "expert-1": 1, "expert-2": 1, "expert-3": 2}


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")  # it has no successor per group
def test_each_tier_of_a_group_has_numbers_that_are_no_reason_to_restart_anything() -> None:
    """Those of a tier went into what its processes are made of."""

    def tiered(**scaling: int) -> dict[str, Any]:
        tiers = [{"groups": [1]}, {}, {"groups": [1], "scaling": scaling}]
        return DEMO | {"experts": {"groups": GROUPS, "tiers": tiers}}

    fixed, before, after = (
        applications(config(tiered(**bounds)))[f"demo-{FINGERPRINT[:8]}"]
        for bounds in ({}, {"min_replicas": 0, "max_replicas": 3}, {"min_replicas": 0})
    )
    names = ["coordinator", "expert-0", "expert-1", "expert-1-tier2", "expert-2", "expert-3"]
    assert [one.name for one in after.deployments] == [one.name for one in fixed.deployments] == names
    assert get_app_code_version(before) == get_app_code_version(after)
    numbers = {one.name: one.num_replicas for one in after.deployments if one.name not in names[2:4]}
    assert set(numbers.values()) == {1}
    bounds = [one.autoscaling_config for one in after.deployments[2:4]]
    assert [(one["min_replicas"], one["max_replicas"]) for one in bounds] == [(1, 1), (0, 1)]
    assert {tuple(one["policy"]["policy_kwargs"]["tiers"]) for one in bounds} == {("expert-1", "expert-1-tier2")}
    assert {one.num_replicas for one in fixed.deployments} == {1}


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")  # it has no successor per group
def test_an_autoscaled_group_grows_by_one_edited_number() -> None:
    scaled = DEMO | {"experts": {"groups": GROUPS, "scaling": {"max_replicas": 3}}}
    document = serve_config(config(scaled))
    before = ServeDeploySchema.model_validate(document).applications[1]
    document["applications"][1]["deployments"][4]["autoscaling_config"]["min_replicas"] = 2
    after = ServeDeploySchema.model_validate(document).applications[1]
    assert after.deployments[4].name == "expert-3"
    assert get_app_code_version(before) == get_app_code_version(after)


def test_what_a_process_is_does_restart_it_and_the_other_applications_stay() -> None:
    before = applications(config())
    after = applications(config(DEMO | {"engine": {"device": "cpu", "max_num_seqs": 8}}))
    [name] = before.keys() - {"gateway"}
    assert get_app_code_version(before[name]) != get_app_code_version(after[name])
    doors = applications(config(max_choices=4))
    assert get_app_code_version(before[name]) == get_app_code_version(doors[name])
    assert get_app_code_version(before["gateway"]) != get_app_code_version(doors["gateway"])


def test_weights_that_are_elsewhere_need_a_version_and_groups() -> None:
    model: dict[str, Any] = {"name": "mixtral", "path": "/models/mixtral", "engine": {"device": "cuda"}}
    with pytest.raises(ConfigError, match="'mixtral': version: say one; /models/mixtral cannot be read here"):
        serve_config(config(model))
    with pytest.raises(ConfigError, match=r"'mixtral': experts\.groups: say which"):
        serve_config(config(model | {"version": "v0.1"}))
    found = applications(config(model | {"version": "v0.1", "experts": {"groups": GROUPS}}))
    assert len(found["mixtral-v0.1"].deployments) == 5
    dense = applications(config(model | {"version": "v0.1", "experts": {"transport": "local"}}))
    assert [one.name for one in dense["mixtral-v0.1"].deployments] == ["coordinator"]


@pytest.mark.parametrize(
    ("model", "gateway", "message"),
    [
        ({"engine": {}}, {}, r"'demo': engine\.device: say cpu or cuda"),
        ({"experts": {"groups": GROUPS, "group_scaling": {4: {}}}}, {}, "there is no group 4"),
        ({}, {"host": "0.0.0.0"}, "needs API keys"),
        ({}, {"http_port": 9000}, "gateway.grpc_port: 9000 is HTTP's port as well"),
    ],
)
def test_what_is_left_open_is_refused(model: dict[str, Any], gateway: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_config(config(DEMO | model, **gateway))


def test_other_weights_than_those_of_the_document_are_refused() -> None:
    arguments = serve_config(config())["applications"][1]["args"]
    made_for_others = rf"has the fingerprint {FINGERPRINT[:8]}…, and the Serve config was made for 0000…"
    with pytest.raises(CheckpointError, match=made_for_others):
        build_model(arguments | {"fingerprint": "0000"})


def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    """In each application: the model's and the gateway's are built by themselves."""
    copy = tmp_path / "demo"
    shutil.copytree(DIRECTORY, copy, ignore=shutil.ignore_patterns("*.py", "questions", "dense"))
    gateway, model = serve_config(config(DEMO | {"path": str(copy)}))["applications"]
    (copy / "tokenizer.json").unlink()
    for build, arguments in ((build_gateway, gateway["args"]), (build_model, model["args"])):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
            build(arguments)


def test_two_versions_of_a_model_are_two_applications() -> None:
    found = applications(config(DEMO | {"version": "v2"}, DEMO | {"version": "v1"}))
    assert list(found) == ["gateway", "demo-v2", "demo-v1"]
    for names in ((None, None), ("v1", "v1")):
        with pytest.raises(ConfigError, match="two versions of a model need a `version` each"):
            config(*(DEMO | ({"version": version} if version else {}) for version in names))


def test_two_models_that_serve_would_take_for_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="'org/m' and 'org-m' would both be the Serve application 'org-m-1'"):
        serve_config(config(*(DEMO | {"name": name, "version": "1"} for name in ("org/m", "org-m"))))


def test_labels_of_nodes_reach_every_process() -> None:
    labels = {"manta/role": "expert"}
    model = DEMO | {"label_selector": {"manta/role": "coordinator"}, "experts": {"groups": GROUPS, "label_selector": labels}}  # fmt: skip # noqa: E501
    arguments = serve_config(config(model))["applications"][1]["args"]
    experts, coordinator = deployments(build_model(arguments))
    assert experts._replica_config.placement_group_bundle_label_selector == [labels] * 2
    assert coordinator._replica_config.ray_actor_options["label_selector"] == {"manta/role": "coordinator"}


def deployments(root: Any) -> tuple[Any, Any]:
    """An expert's deployment and the coordinator's, of a bound application."""
    [coordinator] = root._bound_deployment.init_args
    expert = next(arg for arg in coordinator._bound_deployment.init_args if hasattr(arg, "_bound_deployment"))
    return expert._bound_deployment, coordinator._bound_deployment


@pytest.mark.parametrize(("given", "shard", "coordinator"), [(1.0, 1.0, 1.0), (0.75, 0.75, 0.25), (2.0, 2.0, 1.0)])
def test_gpus_are_reserved_as_they_are_asked_for(given: float, shard: float, coordinator: float) -> None:
    model = DEMO | {"experts": {"groups": GROUPS, "gpus_per_shard": given}}
    expert, attention = deployments(build_model(serve_config(config(model))["applications"][1]["args"]))
    assert expert._replica_config.placement_group_bundles[1]["GPU"] == shard
    assert attention._replica_config.ray_actor_options["num_gpus"] == coordinator
