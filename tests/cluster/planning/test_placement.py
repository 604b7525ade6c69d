"""Groups and fit: plain cases, and what must hold for all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.architecture import all_tensors
from cluster.checkpoint.known_models import KNOWN_MODELS, MIXTRAL_8X7B
from cluster.checkpoint.outline import outline
from cluster.commands.bench.shapes import num_parameters
from cluster.errors import ConfigError, DoesNotFit
from cluster.planning.placement import (
    GPU_GRANULE,
    KNOWN_ROWS_BYTES,
    SERVICE_PROCESS_BYTES,
    TORCH_PROCESS_BYTES,
    ExpertGroup,
    Neighbour,
    Node,
    Room,
    ShardPlace,
    WeightBytes,
    check_fit,
    device_shares,
    expert_bytes,
    has_labels,
    kv_bytes_per_token,
    kv_dtype,
    plan_groups,
    shared_gpu_bytes,
    shared_memory_bytes,
    told,
)
from cluster.planning.weights import held_weights
from experts_service.device_memory import GRANULE, granules
from experts_service.shard.server import MAX_MEMORIES
from experts_service.wire.shared_memory import NUM_SLOTS, ROWS_PER_SLOT, memory_bytes

GIB = 2**30


def sizes(groups: tuple[ExpertGroup, ...]) -> list[int]:
    return [len(group.experts) for group in groups]


@pytest.mark.parametrize(
    ("num_gpus", "num_cpus", "expected"),
    [
        (8, 64, [1] * 8),
        (9, 64, [1] * 8),
        (4, 64, [2] * 4),
        (3, 64, [2, 3, 3]),
        (1, 64, [8]),
        (0, 2, [4, 4]),
        (0, 1, [4, 4]),
        (0, 4, [2] * 4),
        (0, 64, [1] * 8),
    ],
)
def test_auto_makes_as_many_groups_as_the_machine_has_room_for(
    num_gpus: int, num_cpus: int, expected: list[int]
) -> None:
    assert sizes(plan_groups("auto", 8, num_gpus=num_gpus, num_cpus=num_cpus)) == expected


def test_experts_are_told_one_by_one_or_by_the_first_and_last() -> None:
    assert told([0, 1, 5]) == "0, 1, 5"
    assert told([*range(9), 40, *range(100, 128)]) == "0 to 8, 40, 100 to 127"
    assert told([]) == ""


@pytest.mark.parametrize("name", [name for name, known in KNOWN_MODELS.items() if known.scheme is None])
def test_coordinator_and_experts_hold_the_whole_of_any_family(name: str) -> None:
    """Shared experts and dense layers are the coordinator's."""
    architecture = KNOWN_MODELS[name].architecture
    held = WeightBytes.of(architecture, "bfloat16")
    assert held.coordinator + architecture.num_experts * held.expert == 2 * num_parameters(architecture)
    assert held_weights(outline(name, architecture), "bfloat16", "cpu") == held


@given(num_experts=st.integers(1, 64), num_gpus=st.integers(0, 64), num_cpus=st.integers(1, 256))
def test_auto_holds_every_expert_once_in_groups_of_almost_one_size(
    num_experts: int, num_gpus: int, num_cpus: int
) -> None:
    groups = plan_groups("auto", num_experts, num_gpus=num_gpus, num_cpus=num_cpus)
    assert [expert for group in groups for expert in group.experts] == list(range(num_experts))
    assert [group.index for group in groups] == list(range(len(groups)))
    assert max(sizes(groups)) - min(sizes(groups)) <= 1
    assert min(sizes(groups)) >= 1
    assert num_gpus or len(groups) >= min(2, num_experts)


@given(st.permutations(range(8)), st.sets(st.integers(1, 7)))
def test_any_packing_of_all_experts_is_taken_as_it_is(order: list[int], cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), 8]
    setting = tuple(tuple(order[a:b]) for a, b in pairwise(bounds))
    assert tuple(g.experts for g in plan_groups(setting, 8, num_gpus=0, num_cpus=2)) == setting


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (((0, 1), (1, 2, 3)), "experts.groups: expert 1 is named 2 times"),
        (((0, 1), (2,)), "experts.groups: expert 3 is in no group"),
        (((0,), (3,)), "experts.groups: experts 1, 2 are in no group"),
        (((0, 1), (2, 3, 4)), "experts.groups: there is no expert 4; the model has 0 to 3"),
        (((0, 1, 2), (-1, 3)), "experts.groups: there is no expert -1"),
        (((0, 1, 2, 3), ()), "experts.groups: group 1 is empty"),
    ],
)
def test_a_wrong_list_of_groups_is_refused_by_key(setting: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_groups(setting, 4, num_gpus=0, num_cpus=2)


def test_a_dense_model_has_no_groups() -> None:
    assert plan_groups("auto", 0, num_gpus=8, num_cpus=64) == ()
    with pytest.raises(ConfigError, match=r"experts\.groups: the model is dense"):
        plan_groups(((0,),), 0, num_gpus=0, num_cpus=2)


def test_all_processes_together_hold_each_parameter_once() -> None:
    parameters = sum(math.prod(shape) for shape in all_tensors(MIXTRAL_8X7B).values())
    assert parameters == 46_702_792_704  # as the model's card has it: 46.7 B
    assert (
        WeightBytes.of(MIXTRAL_8X7B, "bfloat16").coordinator + expert_bytes(MIXTRAL_8X7B, "bfloat16", 8)
        == 2 * parameters
    )
    assert kv_bytes_per_token(MIXTRAL_8X7B, "bfloat16") == 128 * 1024
    assert kv_bytes_per_token(MIXTRAL_8X7B, "int8") == 66 * 1024  # and four bytes of scale for 128 of codes


def test_mixtral_fits_nine_gpus_of_24_gib_and_not_three() -> None:
    groups = plan_groups("auto", 8, num_gpus=8, num_cpus=64)
    nodes = [Node(f"node-{i}", 64 * GIB, (24 * GIB,) * 3) for i in range(3)]
    check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(nodes), kv_tokens=32768, gpus_per_shard=1, gpus_per_coordinator=1)
    with pytest.raises(DoesNotFit, match=r"the model needs 9\d\.\d\d GiB on 9 GPUs.*has 72\.00 GiB on 3 GPUs"):
        check_fit(
            MIXTRAL_8X7B, "bfloat16", groups, Room(nodes[:1]), kv_tokens=32768, gpus_per_shard=1, gpus_per_coordinator=1
        )


def test_keys_and_values_in_8_bits_are_counted_as_such() -> None:
    groups, nodes = plan_groups("auto", 8, num_gpus=0, num_cpus=8), [Node(f"node-{i}", 16 * GIB) for i in range(9)]
    tokens = 112 * 1024  # 14 GiB in bf16, 7.2 in 8 bits, beside 3 GiB of weights
    check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(nodes), kv_tokens=tokens, kv_dtype="int8")
    with pytest.raises(DoesNotFit, match=r"coordinator 0 needs 1[5-9]"):
        check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(nodes), kv_tokens=tokens)


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_memory_that_coordinators_share_with_shards_is_counted(gpus: float) -> None:
    """A machine with room for the weights alone came to its limit once coordinators were connected."""
    of_pair = shared_memory_bytes(MIXTRAL_8X7B, "bfloat16")
    mapped = memory_bytes(2 * MIXTRAL_8X7B.hidden_size)
    assert mapped == 32 * 2**20 + 4096
    assert of_pair == mapped + KNOWN_ROWS_BYTES
    groups = plan_groups("auto", 8, num_gpus=0, num_cpus=8)

    def fits(memory: int) -> bool:
        room = Room([Node("machine", memory, (80 * GIB,) * 11 if gpus else ())])
        of_gpus = {"gpus_per_shard": gpus, "gpus_per_coordinator": gpus}
        try:
            check_fit(MIXTRAL_8X7B, "bfloat16", groups, room, kv_tokens=4096, num_coordinators=3, **of_gpus)
        except DoesNotFit:
            return False
        return True

    weights = WeightBytes.of(MIXTRAL_8X7B, "bfloat16")
    held = 3 * (weights.coordinator + 4096 * kv_bytes_per_token(MIXTRAL_8X7B, "bfloat16")) + 8 * weights.expert
    held = 0 if gpus else held  # of the machine's own memory
    processes = 11 * (TORCH_PROCESS_BYTES + SERVICE_PROCESS_BYTES)
    assert fits(held + processes + 3 * 8 * of_pair)
    assert not fits(held + processes + 3 * 8 * of_pair - 1)


def test_memory_of_a_shards_gpu_that_coordinators_map_is_counted_on_it() -> None:
    of_one = shared_gpu_bytes(MIXTRAL_8X7B, "bfloat16", 1)
    row_bytes = 2 * MIXTRAL_8X7B.hidden_size
    assert of_one == granules(2 * NUM_SLOTS * ROWS_PER_SLOT * row_bytes)
    assert GRANULE == GPU_GRANULE
    assert shared_gpu_bytes(MIXTRAL_8X7B, "bfloat16", 100) == MAX_MEMORIES * of_one
    groups = plan_groups("auto", 8, num_gpus=8, num_cpus=8)
    expert = WeightBytes.of(MIXTRAL_8X7B, "bfloat16").expert

    def fits(gpu: int, **changes: Any) -> bool:
        nodes = [Node("shards", 80 * GIB, (gpu,) * 8), Node("coordinators", 80 * GIB, (80 * GIB,) * 3)]
        of_gpus: dict[str, Any] = {"gpus_per_shard": 1.0, "gpus_per_coordinator": 1.0, **changes}
        try:
            check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(nodes), kv_tokens=4096, num_coordinators=3, **of_gpus)
        except DoesNotFit:
            return False
        return True

    assert fits(expert + 3 * of_one)
    assert not fits(expert + 3 * of_one - 1)
    for without in ({"rows_on_gpus": False}, {"shares_memory": False}):
        assert fits(expert, **without)


def test_on_another_machine_than_its_coordinators_a_shard_shares_no_memory() -> None:
    """Eight coordinators, each on a machine of its own, made a shard too large for a pod of the manifests' size."""
    base = TORCH_PROCESS_BYTES + SERVICE_PROCESS_BYTES
    weights = WeightBytes.of(MIXTRAL_8X7B, "bfloat16")
    attention = weights.coordinator + 4096 * kv_bytes_per_token(MIXTRAL_8X7B, "bfloat16")
    pods = [Node("experts", 8 * weights.expert + base), *(Node(f"pod {i}", attention + base) for i in range(8))]
    groups = plan_groups([list(range(8))], 8, num_gpus=0, num_cpus=8)
    check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(pods), kv_tokens=4096, num_coordinators=8)


def test_of_a_gpu_they_are_not_kept_so() -> None:
    assert kv_dtype("auto", "bfloat16", "cuda") == kv_dtype("auto", "bfloat16", "cpu") == "bfloat16"
    assert kv_dtype("int8", "float32", "cpu") == "int8"
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype: int8 is for CPUs; on a GPU .* auto"):
        kv_dtype("int8", "bfloat16", "cuda")


def test_shares_of_one_gpu_fit_a_large_one_only() -> None:
    groups = plan_groups("auto", 8, num_gpus=1, num_cpus=16)
    for size, fits in ((140, True), (80, False)):
        arguments = (MIXTRAL_8X7B, "bfloat16", groups, Room([Node("node", 64 * GIB, (size * GIB,))]))
        shares = {"gpus_per_shard": 0.3, "gpus_per_coordinator": 0.3, "kv_tokens": 32768}
        if fits:
            check_fit(*arguments, **shares)
        else:
            with pytest.raises(DoesNotFit, match="expert group"):
                check_fit(*arguments, **shares)


def test_gpus_whose_machine_has_no_memory_left_are_not_said_to_be_missing() -> None:
    """What coordinators and shards of one machine share took its last memory, and GPUs were said to be missing."""
    groups = plan_groups("auto", 8, num_gpus=8, num_cpus=8)
    of_processes = 11 * (TORCH_PROCESS_BYTES + SERVICE_PROCESS_BYTES)
    room = Room([Node("machine", of_processes, (80 * GIB,) * 11), Node("other", of_processes + GIB)])
    expected = r"needs \d\.\d\d GiB of memory, and the most that a node with a GPU for it has left is [0-3]\.\d\d GiB"
    with pytest.raises(DoesNotFit, match=expected):
        check_fit(
            MIXTRAL_8X7B, "bfloat16", groups, room,
            kv_tokens=4096, num_coordinators=3, gpus_per_shard=1.0, gpus_per_coordinator=1.0,
        )  # fmt: skip


def test_mixtral_does_not_fit_a_laptop_and_the_message_has_both_numbers() -> None:
    groups = plan_groups("auto", 8, num_gpus=0, num_cpus=2)
    with pytest.raises(DoesNotFit, match=r"needs 42\.\d\d GiB of memory.*16\.00 GiB.*has 16\.00 GiB free"):
        check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room([Node("laptop", 16 * GIB)]), kv_tokens=4096)


@given(
    layers=st.integers(1, 48),
    num_nodes=st.integers(1, 4),
    memory=st.integers(1, 64),
    extra=st.integers(0, 64),
)
def test_more_memory_never_makes_a_model_that_fits_not_fit(
    layers: int, num_nodes: int, memory: int, extra: int
) -> None:
    architecture = replace(MIXTRAL_8X7B, layers=MIXTRAL_8X7B.layers[:1] * layers)
    groups = plan_groups("auto", 8, num_gpus=0, num_cpus=8)

    def fits(size: int) -> bool:
        nodes = [Node(f"node-{i}", size * GIB) for i in range(num_nodes)]
        try:
            check_fit(architecture, "bfloat16", groups, Room(nodes), kv_tokens=1024)
        except DoesNotFit:
            return False
        return True

    assert fits(memory + extra) >= fits(memory)


@pytest.mark.parametrize(
    ("selector", "suits"),
    [
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!b", "tier": "gpu"}, True),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "!in(b,a)"}, False),
        ({"rack": "1"}, False),
        ({"rack": "!1"}, True),  # as Ray has it: what a node does not say is not 1
    ],
)
def test_labels_are_asked_for_as_ray_reads_them(selector: dict[str, str], suits: bool) -> None:
    assert has_labels({"zone": "a", "tier": "gpu"}, selector) is suits


def test_a_process_takes_memory_of_nodes_with_its_labels_only() -> None:
    """The large node took the shards in this sum, and in the cluster they waited for ever for the small one."""
    groups = plan_groups([list(range(8))], 8, num_gpus=0, num_cpus=8)
    places = [ShardPlace(0.0, WeightBytes.of(MIXTRAL_8X7B, "bfloat16").expert, {"tier": "cpu"})]

    def check(*nodes: Node) -> None:
        check_fit(MIXTRAL_8X7B, "bfloat16", groups, Room(nodes), kv_tokens=4096, places=places)

    large, small = Node("large", 200 * GIB, labels={"tier": "gpu"}), Node("small", 64 * GIB, labels={"tier": "cpu"})
    check(large, Node("other", 100 * GIB, labels={"tier": "cpu"}))
    with pytest.raises(DoesNotFit, match=r"the most that a node labelled tier: cpu has left is 64\.00 GiB"):
        check(large, small)
    with pytest.raises(DoesNotFit, match="expert group 0 asks for a node labelled tier: cpu, and there is none"):
        check(large)


@pytest.mark.parametrize(
    ("shard", "coordinator", "most", "expected"),
    [
        (1.0, 1.0, 4, [(1, 0)]),  # a GPU each
        (0.9, 0.1, 4, [(4, 0), (1, 7)]),  # alone with its like, or beside a shard
        (0.25, 0.5, 4, [(2, 0), (1, 14)]),
        (0.0, 1.0, 1, [(1, 0)]),  # dense, or experts in the coordinator
        (0.0, 0.0, 3, [(3, 0)]),  # no GPUs: all may be on one machine
    ],
)
def test_who_may_be_on_a_coordinators_device(shard, coordinator, most, expected):
    shares = device_shares(
        gpus_per_coordinator=coordinator, max_coordinators=most, neighbours=[Neighbour(shard, 7, most=8)]
    )
    assert [(share.coordinators, share.neighbour_bytes) for share in shares] == expected


@pytest.mark.parametrize(
    ("coordinator", "neighbours", "expected"),
    [
        (0.1, [Neighbour(0.1, None, 1)], [(2, 0)]),  # another model's, which sizes its cache as this one does
        (0.1, [Neighbour(0.1, 5, 2)], [(1, 10)]),  # two whose caches are configured
        (0.1, [Neighbour(0.9, 7, 8), Neighbour(0.1, None, 1)], [(2, 0), (1, 7)]),  # a shard leaves no room for it
        (0.1, [Neighbour(0.8, 7, 8), Neighbour(0.1, 3, 1), Neighbour(0.1, None, 1)], [(2, 7), (1, 10)]),
        (0.1, [Neighbour(0.5, 40, 1), Neighbour(0.3, 30, 2), Neighbour(0.3, 1, 2)], [(1, 70)]),
        (0.1, [Neighbour(1.0, 40, 1), Neighbour(0.0, 30, 2)], [(1, 0)]),  # on a card of its own, and on CPUs
        (0.0, [Neighbour(0.0, None, 2), Neighbour(0.0, 5, 3), Neighbour(0.1, None, 1)], [(3, 0)]),
    ],
)
def test_processes_of_other_models_are_neighbours_too(coordinator, neighbours, expected):
    """A card that two models shared was counted as one's alone: the second to start found nothing left of it."""
    shares = device_shares(gpus_per_coordinator=coordinator, max_coordinators=1, neighbours=neighbours)
    assert [(share.coordinators, share.neighbour_bytes) for share in shares] == expected
