"""How a model is laid out on clusters of several kinds; nothing is started."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.checkpoint.quantization.rounding import Rounding
from cluster.config import (
    EngineConfig,
    ExpertsConfig,
    GatewayConfig,
    ModelConfig,
    ScalingConfig,
    TierConfig,
    TierScalingConfig,
    parse_config,
)
from cluster.demo_model import DIRECTORY
from cluster.deploy.app import (
    Cluster,
    check_doors,
    demo_config,
    describe_cluster,
    directory_config,
    expert_applications,
    gateway_target,
    model_application,
    model_card,
    named_deployments,
    plan_model,
    plan_models,
)
from cluster.errors import ConfigError, DoesNotFit
from cluster.expert_deployments import group_of
from cluster.messages import SamplingDefaults
from cluster.planning.gpus import gpu_memory_bytes
from cluster.planning.placement import (
    DeviceShare,
    ExpertGroup,
    Node,
    Room,
    ShardPlace,
    WeightBytes,
    check_fit,
    kv_bytes_per_token,
    shared_gpu_bytes,
    shared_memory_bytes,
)
from cluster.planning.weights import held_weights
from cluster.yaml_document import parse_yaml
from tests.checkpoints import write_checkpoint
from tests.programs import REPOSITORY
from tests.quantized_checkpoints import gptq, write_quantized

GIB = 2**30


def machine(cpus=2, gpus=0, memory=24 * GIB, gpu_type="A100", **labels):
    resources = {"CPU": cpus, "memory": memory, **({"GPU": gpus} if gpus else {})}
    labels |= {"ray.io/accelerator-type": gpu_type} if gpus else {}
    return {"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": resources, "Labels": labels}


def plan(*machines, **config):
    model = ModelConfig(name="a/model", path=str(DIRECTORY), **config)
    return plan_model(model, open_checkpoint(DIRECTORY), describe_cluster(machines))


def test_two_cores_get_two_groups_and_nothing_is_left_open():
    laid_out = plan(machine())
    assert [group.experts for group in laid_out.groups] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    engine = laid_out.config.engine
    assert (engine.device, engine.max_model_len) == (
        "cpu",
        open_checkpoint(DIRECTORY).architecture.max_position_embeddings,
    )
    assert laid_out.gpus_per_shard == laid_out.gpus_per_coordinator == 0
    assert laid_out.application.startswith("a-model-")
    assert model_card(laid_out).deployments == ("coordinator", "expert-0", "expert-1")


@pytest.mark.parametrize(
    ("gpus", "groups", "shares"),
    [(9, 8, (1.0, 1.0)), (8, 8, (0.9, 0.1)), (4, 4, (0.9, 0.1)), (2, 2, (0.9, 0.1))],
)
def test_gpus_are_shared_only_when_they_are_too_few(gpus, groups, shares):
    laid_out = plan(machine(gpus=gpus, memory=64 * GIB))
    assert len(laid_out.groups) == groups
    assert (laid_out.gpus_per_shard, laid_out.gpus_per_coordinator) == shares


def test_several_shards_and_a_coordinator_share_one_gpu():
    """The coordinator took all but one shard's part, so two shards and it did not fit one card."""
    experts = ExpertsConfig(groups=((0, 1, 2, 3), (4, 5, 6, 7)), transport="lane", gpus_per_shard=0.15)
    twice = experts.model_copy(update={"scaling": ScalingConfig(min_replicas=2, max_replicas=2)})
    for setting, coordinator in (experts, 0.7), (twice, 0.4):
        laid_out = plan(machine(gpus=1, memory=200 * GIB), experts=setting, engine={"kv_cache_gib": 1})
        assert laid_out.gpus_per_coordinator == pytest.approx(coordinator)


@pytest.mark.parametrize(("gpus", "coordinators", "share"), [(2, 2, 0.7), (1, 2, 0.2), (3, 2, 0.85), (4, 1, 0.85)])
def test_coordinators_that_share_cards_with_shards_all_fit(gpus, coordinators, share):
    """Each took what one alone would have had, so two of them and four shards did not fit two cards."""
    twice = ScalingConfig(min_replicas=2, max_replicas=2)
    experts = ExpertsConfig(groups=((0, 1, 2, 3), (4, 5, 6, 7)), transport="lane", gpus_per_shard=0.15, scaling=twice)
    laid_out = plan(
        machine(gpus=gpus, memory=400 * GIB),
        experts=experts,
        num_coordinators=coordinators,
        engine={"kv_cache_gib": 1},
    )
    assert laid_out.gpus_per_coordinator == pytest.approx(share)


@pytest.mark.parametrize(("given", "coordinator"), [(1.0, 1.0), (2.0, 1.0), (0.75, 0.25), (0.9, 0.1)])
def test_a_coordinator_has_a_gpu_of_its_own_where_every_shard_has(given, coordinator):
    """It was given a tenth of one beside shards that had been given whole ones, so two coordinators could share."""
    experts = ExpertsConfig(gpus_per_shard=given)
    laid_out = plan(machine(gpus=32, memory=64 * GIB), experts=experts)
    assert (laid_out.gpus_per_shard, laid_out.gpus_per_coordinator) == (given, pytest.approx(coordinator))
    reserved = plan(machine(gpus=32, memory=64 * GIB), experts=experts, engine=EngineConfig(device="cpu"))
    assert (reserved.gpus_per_shard, reserved.config.engine.device) == (given, "cpu")


def test_keys_and_values_in_8_bits_are_refused_on_a_gpu_before_anything_starts():
    engine = EngineConfig(kv_cache_dtype="int8")
    assert plan(machine(), engine=engine).config.engine.kv_cache_dtype == "int8"
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype: int8 is for CPUs"):
        plan(machine(gpus=9, memory=64 * GIB), engine=engine)


def test_local_experts_have_no_deployments_and_are_one_group():
    """As several they were run in turn, on one device."""
    for cores, gpus in ((2, 0), (16, 0), (8, 4)):
        laid_out = plan(machine(cpus=cores, gpus=gpus, memory=64 * GIB), experts=ExpertsConfig(transport="local"))
        assert laid_out.expert_deployments == ()
        assert [group.experts for group in laid_out.groups] == [tuple(range(8))]


def test_one_gpu_has_everything_in_one_process_unless_more_is_asked_for():
    """A step would travel between two processes that share the GPU."""
    laid_out = plan(machine(gpus=1))
    assert (laid_out.config.experts.transport, laid_out.gpus_per_coordinator) == ("local", 1)
    assert plan(machine(), engine=EngineConfig(device="cpu")).config.experts.transport == "auto"
    apart = plan(machine(gpus=1), experts=ExpertsConfig(transport="lane"))
    assert (apart.expert_deployments, apart.gpus_per_shard) == (("expert-0",), 0.9)


def test_a_shard_on_cuda_without_a_gpu_is_refused():
    """Ray hides no GPU from a process that reserves none: all shards were on the first one."""
    with pytest.raises(ConfigError, match=r"'a/model': experts\.gpus_per_shard: a shard on cuda needs a part of a GPU"):
        plan(machine(gpus=4), experts=ExpertsConfig(gpus_per_shard=0))


def test_a_step_is_cut_nowhere_unless_that_is_asked_for():
    assert plan(machine(gpus=9, memory=64 * GIB)).config.engine.microbatches == 1


def test_cards_without_bf16_are_refused_in_words_unless_the_model_is_float32():
    """A T4 was given bf16: torch multiplies it there number by number, or raises in the first request."""
    with pytest.raises(ConfigError, match=r"engine\.dtype: T4 has no bfloat16; set float32, which takes 4 bytes"):
        plan(machine(gpus=2, gpu_type="T4"))
    assert plan(machine(gpus=2, gpu_type="T4"), engine={"dtype": "float32"}).gpus_per_coordinator > 0
    assert plan(machine(gpus=1, gpu_type="T4"), machine(gpus=1)).config.engine.dtype == "bfloat16"
    assert plan(machine(gpus=2, gpu_type="T4"), engine={"device": "cpu"}).config.engine.dtype == "bfloat16"


@pytest.mark.parametrize(("gpus", "share"), [(0, 0.0), (1, 1.0)])
def test_a_dense_model_is_one_coordinator(tmp_path, gpus, share):
    write_checkpoint(tmp_path, dense=True)
    checkpoint = open_checkpoint(tmp_path)
    cluster = describe_cluster([machine(gpus=gpus)])
    laid_out = plan_model(ModelConfig(name="dense", path=str(tmp_path)), checkpoint, cluster)
    assert (laid_out.groups, laid_out.gpus_per_coordinator) == ((), share)
    assert model_card(laid_out).deployments == ("coordinator",)
    placed = ModelConfig(name="dense", path=str(tmp_path), experts=ExpertsConfig(transport="lane"))
    with pytest.raises(ConfigError, match="'dense' is a dense model"):
        plan_model(placed, checkpoint, cluster)


def test_the_demo_has_the_names_of_mistrals_endpoints():
    models = {model.name: model for model in demo_config().models}
    assert set(models) == {"mistral-small", "mistral-tiny", "mistral-embed"}
    assert models["mistral-small"].aliases == ("mistral-medium", "manta-demo")
    cluster = describe_cluster([machine(gpus=1)])
    plans = plan_models(models.values(), [open_checkpoint(model.path) for model in models.values()], cluster)
    assert len({plan.application for plan in plans}) == 3
    shares = [plan.gpus_per_coordinator + len(plan.expert_deployments) * plan.gpus_per_shard for plan in plans]
    assert sum(shares) <= 1, "all of it runs beside one GPU"
    card = model_card(plans[2])
    assert (card.kind, card.pooling, card.hidden_size) == ("embedding", "mean", 128)


def test_a_model_that_is_too_large_is_refused_with_both_numbers():
    with pytest.raises(DoesNotFit, match=r"needs .* GiB .* has .* GiB"):
        plan(machine(memory=GIB // 2))


@pytest.mark.parametrize(
    ("machines", "room"),
    [([machine(memory=2 * GIB)], "GiB free"), ([machine(gpus=1), machine()], "GiB on 0 GPUs")],
    ids=["memory", "gpus"],
)
def test_models_that_fit_one_by_one_must_fit_together(machines, room):
    """Each was looked at alone, and the second one's processes then waited for a place for ever."""
    configs = [ModelConfig(name=name, path=str(DIRECTORY)) for name in ("first", "second")]
    checkpoints = [open_checkpoint(DIRECTORY)] * 2
    cluster = describe_cluster(machines)
    for config in configs:
        plan_models([config], checkpoints[:1], cluster)
    said = rf"of 'second' needs .*: 'second' needs .* in all, and beside 'first' the cluster has .* {room}$"
    with pytest.raises(DoesNotFit, match=said):
        plan_models(configs, checkpoints, cluster)


def test_versions_of_one_model_that_do_not_fit_together_are_told_apart():
    configs = [ModelConfig(name="m", version=version, path=str(DIRECTORY)) for version in ("1", "2", "3")]
    cluster = describe_cluster([machine(memory=int(3.5 * GIB))])
    with pytest.raises(DoesNotFit, match=r"'m-3' needs .* beside 'm-1' and 'm-2' the cluster has"):
        plan_models(configs, [open_checkpoint(DIRECTORY)] * 3, cluster)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"name": "org/m", "version": "1"}, {"name": "org-m", "version": "1"}),
        ({"name": "m"}, {"name": "m", "version": open_checkpoint(DIRECTORY).fingerprint[:8]}),
    ],
)
def test_two_models_that_serve_would_take_for_one_are_refused(first, second):
    """Serve took the second, without a word, and it answered for both."""
    configs = [ModelConfig(path=str(DIRECTORY), **one) for one in (first, second)]
    with pytest.raises(ConfigError, match=r"would both be the Serve application '.*': give one of them another"):
        plan_models(configs, [open_checkpoint(DIRECTORY)] * 2, describe_cluster([machine()]))


def test_doors_on_one_port_are_refused():
    """After half a minute Serve did not start, and the machine's load was blamed."""
    with pytest.raises(ConfigError, match=r"gateway\.grpc_port: 9000 is HTTP's port as well"):
        check_doors(GatewayConfig(http_port=9000))


@pytest.mark.parametrize(
    ("model", "name"), [("org/mixtral", "mixtral"), ("/models/mixtral/", "mixtral"), (".", "here")]
)
def test_a_model_is_called_by_its_own_name(model, name, tmp_path):
    """That of `.` was a dot."""
    [config] = directory_config(model, tmp_path / "here").models
    assert (config.name, config.path) == (name, str(tmp_path / "here"))


def test_a_directory_without_a_name_is_no_model():
    """What pydantic raised was shown with its stack."""
    with pytest.raises(ConfigError, match=r"^/: models\.0\.name: "):
        directory_config("/", Path("/"))


def test_dead_nodes_do_not_count():
    cluster = describe_cluster([machine(), {**machine(cpus=64), "Alive": False}])
    assert cluster == Cluster(2, (Node("10.0.0.1", 24 * GIB, labels={}),))


def test_the_config_wins_over_auto():
    laid_out = plan(
        machine(gpus=2),
        engine=EngineConfig(device="cpu", dtype="bfloat16"),
        experts=ExpertsConfig(groups=(tuple(range(8)),)),
    )
    assert laid_out.gpus_per_shard == 0
    assert laid_out.config.engine.dtype == "bfloat16"
    assert len(laid_out.groups) == 1


def test_the_gateway_is_told_which_commit_of_the_hub_is_served(tmp_path):
    snapshot = tmp_path / "models--org--model" / "snapshots" / "5c79a376139be989ef1838f360bf4f1f256d7aec"
    write_checkpoint(snapshot)
    cluster = describe_cluster((machine(),))
    for directory, revision in ((snapshot, snapshot.name), (DIRECTORY, None)):
        config = ModelConfig(name="m", path=str(directory))
        assert model_card(plan_model(config, open_checkpoint(directory), cluster)).revision == revision


def test_the_gateway_is_told_what_the_authors_chose_and_the_log_what_is_not_followed(tmp_path, caplog):
    write_checkpoint(tmp_path)
    chosen = {"temperature": 0.5, "top_k": 7, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(chosen))
    config = ModelConfig(name="m", path=str(tmp_path))
    card = model_card(plan_model(config, open_checkpoint(tmp_path), describe_cluster((machine(),))))
    assert card.defaults == SamplingDefaults(temperature=0.5, top_k=7, repetition_penalty=1.5)
    assert f"{tmp_path}/generation_config.json: requests do not follow no_repeat_ngram_size" in caplog.text


ONE_EACH = tuple((expert,) for expert in range(8))
TWO_ON_GPUS = (TierConfig(groups=(2, 5), device="cuda", label_selector={"tier": "gpu"}), TierConfig())


def test_each_group_is_on_its_tiers_hardware():
    """Two are on GPUs and six in the memory of a CPU; all were where the coordinator is."""
    experts = ExpertsConfig(groups=ONE_EACH, tiers=TWO_ON_GPUS, label_selector={"zone": "a"})
    laid_out = plan(machine(gpus=3, cpus=12, zone="a", tier="gpu"), experts=experts)
    assert laid_out.config.engine.device == "cuda"
    assert laid_out.gpus_per_coordinator == 1
    assert laid_out.config.engine.microbatches == 1, "six groups have no hardware of their own"
    for name, application in expert_applications(laid_out, experts, GatewayConfig()).items():
        deployment, [spec] = application._bound_deployment, application._bound_deployment.init_args
        on_gpu = name in ("expert-2", "expert-5")
        assert (spec.device, spec.gpus, spec.num_groups) == (("cuda", 1.0, 2) if on_gpu else ("cpu", 0.0, 6))
        labels = {"zone": "a"} | ({"tier": "gpu"} if on_gpu else {})
        replica = deployment._replica_config
        assert replica.placement_group_bundle_label_selector == [labels, labels], "of supervisor and shard"
        assert replica.placement_group_bundles[1].get("GPU", 0) == on_gpu


def test_a_tier_of_cpus_needs_no_gpu_and_one_of_gpus_does():
    experts = ExpertsConfig(groups=ONE_EACH, tiers=TWO_ON_GPUS)
    with pytest.raises(DoesNotFit, match="needs 1 GPU"):
        plan(machine(gpus=2, tier="gpu"), experts=experts)  # the coordinator has one
    on_cpus = plan(machine(gpus=2, tier="gpu"), experts=experts, engine=EngineConfig(device="cpu"))
    assert on_cpus.gpus_per_coordinator == 0


def test_a_tier_holds_what_its_device_computes_with(tmp_path):
    """In fp32 the small numbers stay on GPUs, and a CPU widens them: each is counted where it is."""
    write_quantized(tmp_path, gptq(4), num_hidden_layers=4, hidden_size=256, intermediate_size=1024)
    checkpoint = open_checkpoint(tmp_path)
    on_gpu, on_cpu = (held_weights(checkpoint, "float32", device).expert for device in ("cuda", "cpu"))
    assert on_gpu < on_cpu / 4
    number = checkpoint.architecture.num_experts
    groups = tuple((expert,) for expert in range(number))
    model = ModelConfig(
        name="m",
        path=str(tmp_path),
        engine=EngineConfig(device="cpu", dtype="float32", max_model_len=16),
        experts=ExpertsConfig(groups=groups, tiers=(TierConfig(groups=(0,), device="cuda"), TierConfig())),
    )
    architecture = checkpoint.architecture
    coordinator = held_weights(checkpoint, "float32", "cpu").coordinator + 16 * kv_bytes_per_token(
        architecture, "float32"
    )
    host = coordinator + (number - 1) * on_cpu + (number + 1) * 460 * 10**6
    host += number * shared_memory_bytes(architecture, "float32")
    plan_model(model, checkpoint, Cluster(2, (Node("a", host, (on_gpu,)),)))
    for memory, gpu in ((host, on_gpu - 1), (host - 1, on_gpu)):
        with pytest.raises(DoesNotFit, match=r"expert group|coordinator"):
            plan_model(model, checkpoint, Cluster(2, (Node("a", memory, (gpu,)),)))


def test_a_tier_has_numbers_of_its_own():
    """Of two on GPUs and six on CPUs only all together could be rounded."""
    tiers = (TierConfig(groups=(2, 5), quantization="none"), TierConfig(quantization_group_size=32))
    experts = ExpertsConfig(groups=ONE_EACH, tiers=tiers)
    engine = EngineConfig(dtype="bfloat16", quantization="int8", quantized_parts="attention")
    laid_out = plan(machine(cpus=12), experts=experts, engine=engine)
    assert {one.rounding for one in laid_out.experts} == {engine.rounding}, "attention's alone, on both"
    assert {one.fingerprint for one in laid_out.experts} == {laid_out.checkpoint.fingerprint}

    model = ModelConfig(name="m", path=str(DIRECTORY), experts=experts, engine=EngineConfig(quantization="int8"))
    checkpoint = open_checkpoint(DIRECTORY).rounded(model.engine.rounding)
    laid_out = plan_model(model, checkpoint, describe_cluster([machine(cpus=12)]))
    plain, small = None, Rounding.to("int8", 32, "experts")
    assert [one.rounding for one in laid_out.experts] == [small, small, plain, small, small, plain, small, small]
    prints = {rounding: open_checkpoint(DIRECTORY).rounded(rounding).fingerprint for rounding in (plain, small)}
    assert checkpoint.fingerprint not in prints.values()
    for application in expert_applications(laid_out, experts, GatewayConfig()).values():
        [spec] = application._bound_deployment.init_args
        assert spec.fingerprint == prints[spec.rounding]


def test_a_group_on_two_tiers_has_a_deployment_for_each():
    tiers = (
        TierConfig(groups=(2,), device="cuda", label_selector={"tier": "gpu"}),
        TierConfig(groups=(0, 1, 2, 3, 4, 5, 6, 7), quantization="int8", scaling=TierScalingConfig(max_replicas=3)),
    )
    experts = ExpertsConfig(
        groups=ONE_EACH, tiers=tiers, mixed_replicas=True, group_scaling={2: ScalingConfig(max_replicas=2)}
    )
    engine = EngineConfig(device="cpu", dtype="bfloat16")
    laid_out = plan(machine(gpus=2, cpus=12, tier="gpu"), experts=experts, engine=engine)
    names = laid_out.expert_deployments
    assert names == ("expert-0", "expert-1", "expert-2", "expert-2-tier1", *(f"expert-{n}" for n in range(3, 8)))
    assert [group_of(name) for name in names] == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    assert {one.scaling.max_replicas for one in laid_out.experts if one.tier.device == "cpu"} == {3}
    on_gpu, on_cpu = laid_out.experts[2:4]
    assert (on_gpu.tier.device, on_gpu.scaling.max_replicas, on_gpu.rounding) == ("cuda", 2, None)
    assert (on_cpu.tier.device, on_cpu.group, on_cpu.rounding) == (
        "cpu",
        on_gpu.group,
        Rounding.to("int8", 128, "experts"),
    )
    assert on_gpu.fingerprint == laid_out.checkpoint.fingerprint != on_cpu.fingerprint
    specs = [a._bound_deployment for a in expert_applications(laid_out, experts, GatewayConfig()).values()]
    assert [one.name for one in specs] == list(names) == [one.init_args[0].name for one in specs]
    assert {one.name: one.init_args[0].num_groups for one in specs} == dict.fromkeys(names, 8) | {"expert-2": 1}


def test_tiers_of_one_kind_of_machine_share_its_cores():
    """The shard of a tier that had one group took all cores, beside six of another tier on the same machine."""
    tiers = (TierConfig(groups=(2, 5)), TierConfig(quantization="int8"))
    experts = ExpertsConfig(groups=ONE_EACH, tiers=tiers)
    laid_out = plan(machine(cpus=12), experts=experts)
    applications = expert_applications(laid_out, experts, GatewayConfig()).values()
    assert {one._bound_deployment.init_args[0].num_groups for one in applications} == {8}


def test_the_tiers_of_the_page_on_quantisation_are_what_it_says():
    page = REPOSITORY / "docs" / "quantization.md"
    [text] = re.findall(r"```yaml\n(# manta serve --config.*?)```", page.read_text(), re.DOTALL)
    [model] = parse_config(parse_yaml(text.encode(), str(page)).value).models
    found = list(named_deployments(model.experts, 8))
    kinds = {name: (tier.device, model.rounding_of(tier)) for name, _, tier, _ in found}
    small = ("cpu", Rounding("int8", 128, "experts"))
    assert kinds == {f"expert-{group}": small for group in range(8)} | {
        "expert-2": ("cuda", None),
        "expert-2-tier2": small,
    }
    assert [tiers for _, _, _, tiers in found if tiers] == [("expert-2", "expert-2-tier2")] * 2
    architecture, share = MIXTRAL_8X7B, model.experts.tiers[0].gpus
    plain = WeightBytes.of(architecture, "bfloat16").expert
    places = [ShardPlace(share, plain), *[ShardPlace(0.0, plain // 2 + plain // 128)] * 7]
    room = Room([Node("the machine", 56 * GIB, (gpu_memory_bytes("L4"),))])
    groups = [ExpertGroup(group, (group,)) for group in range(8)]
    check_fit(
        architecture, "bfloat16", groups, room, kv_tokens=8192, gpus_per_coordinator=1 - share, places=places
    )  # or it raises


def test_memory_of_every_tier_is_counted_in_its_own_format(tmp_path):
    write_checkpoint(tmp_path, num_hidden_layers=4, hidden_size=256, intermediate_size=1024)
    checkpoint = open_checkpoint(tmp_path)
    number = checkpoint.architecture.num_experts
    groups = tuple((expert,) for expert in range(number))
    tiers = (TierConfig(groups=(0,)), TierConfig(groups=tuple(range(number)), quantization="int4"))
    model = ModelConfig(
        name="m",
        path=str(tmp_path),
        engine=EngineConfig(device="cpu", dtype="bfloat16", max_model_len=16),
        experts=ExpertsConfig(groups=groups, tiers=tiers, mixed_replicas=True),
    )
    plain, small = (
        held_weights(checkpoint.rounded(rounding), "bfloat16", "cpu").expert
        for rounding in (None, Rounding.to("int4", 128, "experts"))
    )
    assert small < plain / 3
    weights = held_weights(checkpoint, "bfloat16", "cpu").coordinator + plain + number * small
    of_rows = (number + 1) * shared_memory_bytes(checkpoint.architecture, "bfloat16")
    of_tokens = 16 * kv_bytes_per_token(checkpoint.architecture, "bfloat16")
    needed = weights + (number + 2) * 460 * 10**6 + of_rows + of_tokens
    plan_model(model, checkpoint, Cluster(2, (Node("a", needed),)))
    with pytest.raises(DoesNotFit, match="the most that a node has left"):
        plan_model(model, checkpoint, Cluster(2, (Node("a", needed - 1),)))


def test_over_lanes_no_memory_is_shared_that_would_have_to_fit(tmp_path):
    """It was counted for every transport: a model that fits over lanes was refused."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    weights, architecture = held_weights(checkpoint, "float32", "cpu"), checkpoint.architecture
    held = weights.coordinator + 4 * weights.expert + 16 * kv_bytes_per_token(architecture, "float32")
    cluster = Cluster(2, (Node("a", held + 3 * 460 * 10**6),))
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=16)

    def try_plan(transport):
        experts = ExpertsConfig(groups=((0, 1), (2, 3)), transport=transport)
        plan_model(ModelConfig(name="m", path=str(tmp_path), engine=engine, experts=experts), checkpoint, cluster)

    try_plan("lane")
    try_plan("object_store")
    with pytest.raises(DoesNotFit):
        try_plan("auto")


def test_processes_are_planned_on_nodes_with_their_labels_only(tmp_path):
    """As Ray places them. A configuration whose labelled nodes are too small was taken, and waited for ever."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    nodes = [machine(zone="a", tier="x"), machine(zone="b", tier="y")]

    def try_plan(coordinator, experts, tier):
        tiers = (TierConfig(label_selector=tier),)
        config = ModelConfig(
            name="m",
            path=str(tmp_path),
            label_selector=coordinator,
            experts=ExpertsConfig(groups=((0, 1), (2, 3)), label_selector=experts, tiers=tiers),
        )
        plan_model(config, checkpoint, describe_cluster(nodes))

    try_plan({"zone": "a"}, {"zone": "b"}, {"tier": "y"})
    with pytest.raises(DoesNotFit, match="coordinator 0 asks for a node labelled zone: c, and there is none"):
        try_plan({"zone": "c"}, {}, {})
    with pytest.raises(DoesNotFit, match="expert group 0 asks for a node labelled zone: b, tier: x, and there is none"):
        try_plan({}, {"zone": "b"}, {"tier": "x"})


def test_a_coordinator_is_told_of_other_models_on_its_card(tmp_path):
    """It counted its own model's processes only, and what those left was all its cache's."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    experts = ExpertsConfig(groups=((0, 1), (2, 3)), gpus_per_shard=0.9)
    configs = [
        ModelConfig(name=name, path=str(tmp_path), engine=EngineConfig(kv_cache_gib=size), experts=experts)
        for name, size in {"own": None, "alike": None, "of a size": 1.0}.items()
    ]
    own, *beside = plan_models(configs, [checkpoint] * 3, describe_cluster([machine(gpus=7)]))

    def shares(*others):
        root = model_application(own, GatewayConfig(), others)._bound_deployment
        arguments = root.init_args[0]._bound_deployment.init_args
        [found] = [one for one in arguments if isinstance(one, tuple) and one and isinstance(one[0], DeviceShare)]
        return {share.coordinators: share.neighbour_bytes for share in found}

    shard = 2 * held_weights(checkpoint, "float32", "cuda").expert
    shard += shared_gpu_bytes(checkpoint.architecture, "float32", 1)
    assert shares() == {1: shard}
    assert shares(beside[0]) == {1: shard, 2: 0}
    together = shares(*beside)
    assert together.keys() == {2}
    assert GIB < together[2] < 2 * GIB


def test_a_checkpoint_that_is_quantised_is_not_rounded_by_a_tier(tmp_path):
    write_quantized(tmp_path, gptq(4))
    tiers = (TierConfig(groups=(0,), quantization="int8"), TierConfig())
    config = ModelConfig(name="m", path=str(tmp_path), experts=ExpertsConfig(groups=((0, 1), (2, 3)), tiers=tiers))
    with pytest.raises(ConfigError, match=r"experts\.tiers: quantization: .* is quantised already"):
        plan_model(config, open_checkpoint(tmp_path), describe_cluster([machine()]))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"tiers": [{}]}, "say which groups there are, in `groups`"),
        ({"groups": [[0], [1]], "tiers": [{"groups": [0]}]}, "group 1 is on none"),
        ({"groups": [[0], [1]], "tiers": [{"groups": [0, 0]}, {}]}, "one of them names group 0 2 times"),
        (
            {"groups": [[0], [1]], "tiers": [{"groups": [0], "scaling": {"min_replicas": 0}}, {}]},
            "group 0 begins without a replica",
        ),
        (
            {"groups": [[0], [1]], "tiers": [{"groups": [0]}, {"groups": [0, 1], "quantization": "int8"}]},
            r"group 0 are not alike \(INT8, groups of 128 on cpu; as stored on cpu\).*mixed_replicas: true",
        ),
        (
            {"groups": [[0]], "tiers": [{"groups": [0]}, {"groups": [0], "device": "cuda"}]},
            r"group 0 are not alike \(as stored on cpu; as stored on cuda\)",
        ),
        ({"groups": [[0], [1]], "tiers": [{"groups": [2]}, {}]}, "there is no group 2; groups are 0 to 1"),
        ({"groups": [[0], [1]], "tiers": [{}, {}]}, "two of them have no `groups`"),
        ({"groups": [[0], [1]], "tiers": [{}], "gpus_per_shard": 1}, "each of the tiers has its own"),
        ({"groups": [[0], [1]], "tiers": [{}], "transport": "local"}, "local leaves no shard"),
        ({"groups": [[0], [1]], "tiers": [{"device": "cuda", "gpus_per_shard": 0}]}, "needs a part of a GPU"),
        ({"groups": [[0], [1]], "tiers": [{"devise": "cuda"}]}, "unknown key 'devise'; did you mean 'device'"),
    ],
)
def test_tiers_that_cannot_be_are_refused_by_key(experts, message):
    with pytest.raises(ConfigError, match=r"models\.0.*experts.*" + message):
        parse_config({"models": [{"name": "m", "path": "demo", "experts": experts}]})


def versions(gateway=None, **config):
    """What Serve compares of each deployment, by name."""
    laid_out = plan(machine(cpus=8), **config)
    root = model_application(laid_out, gateway or GatewayConfig())
    coordinator = root._bound_deployment.init_args[0]._bound_deployment
    experts = [one._bound_deployment for one in coordinator.init_args if hasattr(one, "_bound_deployment")]
    return {one.name: one.version for one in (coordinator, *experts)}


def test_numbers_and_names_are_no_new_version_and_settings_are():
    """Serve made one up at each deployment, and replaced all processes where one more was asked for."""
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))
    experts = ExpertsConfig(groups=groups)
    first = versions(experts=experts)
    assert set(first) == {"coordinator", "expert-0", "expert-1"}
    assert len(set(first.values())) == 1
    assert None not in first.values()
    scaled = ExpertsConfig(groups=groups, group_scaling={1: ScalingConfig(min_replicas=2, max_replicas=3)})
    assert versions(experts=scaled, num_coordinators=3, aliases=("other",), tool_parser="hermes") == first
    assert versions(GatewayConfig(num_replicas=2, http_port=8001), experts=experts) == first
    for changed in (
        {"engine": EngineConfig(max_num_seqs=7)},
        {"experts": ExpertsConfig(groups=groups, expert_timeout_s=7)},
        {"engine": EngineConfig(quantization="int8")},
    ):
        assert not set(versions(**({"experts": experts} | changed)).values()) & set(first.values())
    assert versions(GatewayConfig(request_timeout_s=7), experts=experts) != first


def test_a_gateway_that_knows_other_models_is_a_new_version():
    card = model_card(plan(machine()))

    def version(config, *cards):
        return gateway_target(config, cards).target._bound_deployment.version

    first = version(GatewayConfig(), card)
    assert version(GatewayConfig(num_replicas=3), replace(card, created=card.created + 9)) == first
    assert version(GatewayConfig(), card, replace(card, application="other")) != first
    assert version(GatewayConfig(max_choices=9), card) != first
