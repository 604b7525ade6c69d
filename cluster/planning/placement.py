"""Which experts share a process, and whether the whole fits the machines. Plain arithmetic; no torch, no Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cluster.checkpoint.architecture import Architecture, coordinator_tensors, expert_tensors
from cluster.errors import ConfigError, DoesNotFit

Dtype = Literal["float32", "bfloat16"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
KvDtype = Literal["float32", "bfloat16", "int8"]  # of keys and values in the cache
KV_SCALE_BYTES = 4  # in int8, of a token's keys in one head, and of its values

# Resident memory of a process before it holds a weight, measured with Ray 2.60 and torch 2.13 on Linux.
SERVICE_PROCESS_BYTES = 160 * 10**6  # a Serve replica without torch
TORCH_PROCESS_BYTES = 300 * 10**6  # a process that has imported torch
MOST_TOLD = 8  # neighbouring experts whose numbers are all in a table
SHARED_ROWS = 2048  # that a coordinator and a shard of one machine have room for, and for their answers
MOST_SHARING = 16  # coordinators that one shard shares memory with
GPU_GRANULE = 2 * 2**20  # bytes; of a GPU's memory that is shared
SHARED_STATES_BYTES = 4096  # a page that says of each slot whether its answer is there
# What a shard keeps of the kinds of rows that a coordinator has sent, 2,048 at most: 4.2 KB each were measured, with
# experts in int8 7.2.
KNOWN_ROWS_BYTES = 15 * 10**6


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts that live in one process, the same in every layer. A replica is one live copy of a group."""

    index: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """What a machine has free."""

    name: str
    memory_bytes: int
    gpu_memory_bytes: tuple[int, ...] = ()  # of each GPU
    labels: Mapping[str, str] | None = None  # Ray's; None: those that are asked for, whatever they are


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """Who may be on the device of a coordinator."""

    coordinators: int = 1  # as many like it, itself included
    neighbour_bytes: int = 0  # of shards, and of coordinators whose cache has a size that is configured


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Processes that may be on a coordinator's device beside it, and are alike."""

    gpus: float
    held_bytes: int | None  # of each; None: a coordinator that sizes its cache by what the device has, as this one does
    most: int  # of them


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What weights take in the memory of the processes that hold them."""

    coordinator: int  # attention, norms, gates, embeddings, and the whole of a dense model
    expert: int  # one in all layers, the largest; 0: dense

    @classmethod
    def of(cls, architecture: Architecture, dtype: Dtype) -> WeightBytes:
        """Of a model that is not quantised."""
        coordinator = sum(math.prod(shape) for shape in coordinator_tensors(architecture).values()) * DTYPE_BYTES[dtype]
        return cls(coordinator, expert_bytes(architecture, dtype) if architecture.num_experts else 0)


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """What the shards of one group are on."""

    gpus: float
    expert_bytes: int  # of one expert, as the device holds it
    label_selector: Mapping[str, str] = field(default_factory=dict)


class _Process(NamedTuple):
    """What asks for a place."""

    name: str
    held: int  # bytes of its weights, and of its cache
    gpus: float
    is_shard: bool
    label_selector: Mapping[str, str]


class Room:
    """What the nodes have left while processes find their places, those of one model after those of another."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._labels = [node.labels for node in nodes]
        self.memory = [node.memory_bytes for node in nodes]
        self.gpus = [[[1.0, float(size)] for size in node.gpu_memory_bytes] for node in nodes]  # [share, bytes] of each
        self.models: list[str] = []  # that have found theirs

    @property
    def gpu_bytes(self) -> list[float]:
        """What each GPU has left that is not taken wholly."""
        return [size for gpus in self.gpus for share, size in gpus if share > 1e-9]

    def nodes_for(self, selector: Mapping[str, str]) -> list[int]:
        """Those that have the labels, most free memory first."""
        suited = [node for node, labels in enumerate(self._labels) if labels is None or has_labels(labels, selector)]
        return sorted(suited, key=lambda node: -self.memory[node])

    def place(
        self, share: float, weights: int, host: int, beside: Mapping[int, int], selector: Mapping[str, str]
    ) -> int | None:
        """Take what a process needs from the node with most memory free. Returns its index; None: no node has it.

        `host`: bytes of the node's memory, and `beside` more of these nodes, for who is there already. `selector`: the
        labels that the node is to have.
        """
        for node in self.nodes_for(selector):
            needed = host + beside.get(node, 0)
            if self.memory[node] < needed:
                continue
            if share:
                count, each = max(1, math.ceil(share)), min(1.0, share)
                free = sorted((g for g in self.gpus[node] if g[0] >= each - 1e-9), key=lambda gpu: -gpu[1])
                if len(free) < count or free[count - 1][1] < weights / count:
                    continue
                for gpu in free[:count]:
                    gpu[0] -= each
                    gpu[1] -= weights / count
            self.memory[node] -= needed
            return node
        return None


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether Ray would place there what asks for these: `a`, `!a`, `in(a, b)` or `!in(a, b)` of each label."""
    for key, wanted in selector.items():
        value = wanted.removeprefix("!")
        values = value[len("in(") : -1].split(",") if value.startswith("in(") else [value]
        if (labels.get(key) in [one.strip() for one in values]) == wanted.startswith("!"):
            return False
    return True


def told(experts: Sequence[int]) -> str:
    """Their numbers for a table; many neighbours by the first and the last."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > MOST_TOLD else ", ".join(map(str, run)) for run in runs)


def as_one(groups: Sequence[ExpertGroup]) -> tuple[ExpertGroup, ...]:
    """All experts in one group, in the same order: what one process can compute in one call."""
    experts = tuple(expert for group in groups for expert in group.experts)
    return (ExpertGroup(0, experts),) if experts else ()


def plan_groups(
    setting: Literal["auto"] | Sequence[Sequence[int]], num_experts: int, num_gpus: int, num_cpus: int
) -> tuple[ExpertGroup, ...]:
    """The groups of a model.

    `auto`: one expert a group where there is a GPU for each, else a group for each GPU; without GPUs a group for each
    core, and at least 2; sizes differ by at most one expert. `num_gpus` are those that experts may have. A dense model
    has no groups. Raises ConfigError when a list of groups does not name every expert exactly once.
    """
    if num_experts == 0:
        if setting != "auto":
            raise ConfigError("experts.groups: the model is dense, it has no experts to group")
        return ()
    if setting == "auto":
        num_groups = min(num_experts, num_gpus or max(2, num_cpus))
        bounds = [num_experts * i // num_groups for i in range(num_groups + 1)]
        return tuple(ExpertGroup(i, tuple(range(bounds[i], bounds[i + 1]))) for i in range(num_groups))
    named = [expert for group in setting for expert in group]
    for index, group in enumerate(setting):
        if not group:
            raise ConfigError(f"experts.groups: group {index} is empty")
    for expert in named:
        if not 0 <= expert < num_experts:
            raise ConfigError(f"experts.groups: there is no expert {expert}; the model has 0 to {num_experts - 1}")
        if named.count(expert) > 1:
            raise ConfigError(f"experts.groups: expert {expert} is named {named.count(expert)} times")
    if missing := sorted(set(range(num_experts)) - set(named)):
        which = f"expert {told(missing)} is" if len(missing) == 1 else f"experts {told(missing)} are"
        raise ConfigError(f"experts.groups: {which} in no group")
    return tuple(ExpertGroup(index, tuple(group)) for index, group in enumerate(setting))


def expert_bytes(architecture: Architecture, dtype: Dtype, num_experts: int = 1) -> int:
    """Weights of that many experts in all layers."""
    a = architecture
    of_one = sum(math.prod(shape) for layer in range(a.num_layers) for shape in expert_tensors(a, layer, 0).values())
    return num_experts * of_one * DTYPE_BYTES[dtype]


def check_kv_dtype(setting: Literal["auto", "int8"], device: str) -> None:
    """Raises ConfigError where keys and values cannot be kept so."""
    if setting != "auto" and device == "cuda":
        raise ConfigError(
            f"engine.kv_cache_dtype: {setting} is for CPUs; on a GPU keys and values are kept in what the model "
            "computes in, auto"
        )


def kv_dtype(setting: Literal["auto", "int8"], dtype: Dtype, device: str) -> KvDtype:
    """What keys and values are kept in by a model that computes in `dtype`. Raises ConfigError where it cannot be."""
    check_kv_dtype(setting, device)
    return dtype if setting == "auto" else setting


def kv_bytes_per_token(architecture: Architecture, dtype: KvDtype) -> int:
    """Keys and values of one token in all layers."""
    a = architecture
    bytes_of_head = a.head_dim + KV_SCALE_BYTES if dtype == "int8" else a.head_dim * DTYPE_BYTES[dtype]
    return 2 * a.num_layers * a.num_kv_heads * bytes_of_head


def shared_memory_bytes(architecture: Architecture, dtype: Dtype) -> int:
    """What one coordinator and one shard of its machine take together: what both map, and what the shard remembers."""
    both_map = 2 * SHARED_ROWS * architecture.hidden_size * DTYPE_BYTES[dtype] + SHARED_STATES_BYTES
    return both_map + KNOWN_ROWS_BYTES


def shared_gpu_bytes(architecture: Architecture, dtype: Dtype, num_coordinators: int) -> int:
    """Of a shard's GPU that coordinators on GPUs of its machine map as well, so many of them at most."""
    of_pair = 2 * SHARED_ROWS * architecture.hidden_size * DTYPE_BYTES[dtype]
    return min(num_coordinators, MOST_SHARING) * -(-of_pair // GPU_GRANULE) * GPU_GRANULE


def check_fit(
    architecture: Architecture,
    dtype: Dtype,
    groups: Sequence[ExpertGroup],
    room: Room,
    *,
    kv_tokens: int,
    kv_dtype: KvDtype | None = None,
    weights: WeightBytes | None = None,
    num_coordinators: int = 1,
    gpus_per_shard: float = 0.0,
    gpus_per_coordinator: float = 0.0,
    local: bool = False,
    places: Sequence[ShardPlace] | None = None,
    name: str | None = None,
    label_selector: Mapping[str, str] | None = None,
    shares_memory: bool = True,
    rows_on_gpus: bool = True,
) -> None:
    """Raises DoesNotFit, with what is needed and what there is, unless every process finds a place, which it takes.

    Largest first, each where most memory is free: on a GPU where it asks for one, else in a node's memory. A process
    that asks for half a GPU shares it; one that asks for two gets two whole ones of one node. With `local`, every
    coordinator holds all experts itself. `weights`: None where none is quantised. `places`: that of each of `groups`;
    None: all are where the coordinators are. `name`: the model's, for the message, where it may be one of several.
    `kv_dtype`: what the cache is kept in; None: `dtype`. `label_selector`: of the coordinators; that of a shard is its
    place's. `shares_memory`: coordinators and shards of one node map memory that both use; `rows_on_gpus`: between GPUs
    some of the shard's as well.
    """
    coordinators_selector = label_selector or {}
    weights = weights or WeightBytes.of(architecture, dtype)
    if places is None:
        places = [ShardPlace(gpus_per_shard, weights.expert)] * len(groups)
    of_slots = 0  # of a shard's GPU
    if shares_memory and rows_on_gpus and gpus_per_coordinator:
        of_slots = shared_gpu_bytes(architecture, dtype, num_coordinators)
    shards = [
        _Process(
            f"expert group {group.index}",
            len(group.experts) * place.expert_bytes + (of_slots if place.gpus else 0),
            place.gpus,
            is_shard=True,
            label_selector=place.label_selector,
        )
        for group, place in zip(groups, places, strict=True)
        if not local
    ]
    attention = weights.coordinator + kv_tokens * kv_bytes_per_token(architecture, kv_dtype or dtype)
    if local:
        attention += architecture.num_experts * weights.expert
    coordinators = [
        _Process(f"coordinator {i}", attention, gpus_per_coordinator, False, coordinators_selector)
        for i in range(num_coordinators)
    ]
    processes = coordinators + shards
    of_pair = shared_memory_bytes(architecture, dtype) if shares_memory else 0
    shards_on, coordinators_on = Counter[int](), Counter[int]()  # by node
    memory, gpus = sum(room.memory), room.gpu_bytes
    for process, held, share, is_shard, selector in sorted(processes, key=lambda process: -process.held):
        host = TORCH_PROCESS_BYTES + SERVICE_PROCESS_BYTES + (0 if share else held)
        own, others = (shards_on, coordinators_on) if is_shard else (coordinators_on, shards_on)
        beside_it = {at: of_pair * there for at, there in others.items()}
        node = room.place(share, held, host, beside_it, selector)
        if node is None:
            needs = gib(sum(one.held for one in processes))
            model = "the model" if name is None else repr(name)
            beside = f" beside {' and '.join(map(repr, room.models))}" if room.models else ""
            of = f" of {model}" if room.models else ""
            suited = room.nodes_for(selector)
            labels = ", ".join(f"{key}: {value}" for key, value in selector.items())
            kind = f"node labelled {labels}" if selector else "node"
            if not suited:
                raise DoesNotFit(f"{process}{of} asks for a {kind}, and there is none")
            roomiest = room.place(share, held, 0, {}, selector)  # of those with GPUs, where it asks for them
            if roomiest is None:
                wanted = sum(one.gpus for one in processes)
                raise DoesNotFit(
                    f"{process}{of} needs {share:g} GPU with {gib(held)} free, and no {kind} has one left: {model} "
                    f"needs {needs} on {wanted:g} GPUs in all, and{beside} the cluster has {gib(sum(gpus))} on "
                    f"{len(gpus)} GPUs"
                )
            host, most = host + beside_it.get(roomiest, 0), gib(room.memory[roomiest])
            kind = f"{kind} with a GPU for it" if share else kind
            raise DoesNotFit(
                f"{process}{of} needs {gib(host)} of memory, and the most that a {kind} has left is {most}: {model} "
                f"needs {needs} in all, and{beside} the cluster has {gib(memory)} free"
            )
        own[node] += 1
    room.models.append(name or "a model")


def device_shares(
    *, gpus_per_coordinator: float, max_coordinators: int, neighbours: Sequence[Neighbour] = ()
) -> tuple[DeviceShare, ...]:
    """Who may be beside a coordinator on its device, in every way that Ray may place them.

    Without GPUs all coordinators may be on one machine; shards take what they take of its memory. `max_coordinators`:
    as many like it, itself included; `neighbours`: all others, of its model and of those beside it.
    """
    alike = sorted((one.gpus, one.most) for one in neighbours if one.held_bytes is None)
    if gpus_per_coordinator == 0:
        return (DeviceShare(max_coordinators + sum(most for gpus, most in alike if gpus == 0)),)
    free = max(0.0, 1.0 - gpus_per_coordinator) + 1e-9
    alike = sorted([(gpus_per_coordinator, max_coordinators - 1), *((gpus, most) for gpus, most in alike if gpus)])
    used = [0.0]  # by none of them, the smallest, the two smallest, …
    for gpus, most in alike:
        for _ in range(most):
            if used[-1] + gpus > free:
                break
            used.append(used[-1] + gpus)
    shares: list[DeviceShare] = []
    for number, taken in reversed([*enumerate(used, start=1)]):
        largest = _most_bytes(neighbours, free - taken)
        if not shares or largest > shares[-1].neighbour_bytes:
            shares.append(DeviceShare(number, largest))
    return tuple(shares)


def _most_bytes(neighbours: Sequence[Neighbour], free: float) -> int:
    """What those of a known size that fit a part of a GPU together hold at most."""
    held_by = {0.0: 0}  # the most, by what they take of the GPU
    for one in neighbours:
        if one.held_bytes is None or not 0 < one.gpus <= free:
            continue
        for _ in range(min(one.most, int(free / one.gpus))):
            for taken, held in list(held_by.items()):
                both = round(taken + one.gpus, 4)  # as Ray counts
                if both <= free:
                    held_by[both] = max(held_by.get(both, 0), held + one.held_bytes)
    return max(held_by.values())


def gib(size: float) -> str:
    """`7.25 GiB`, for a person."""
    return f"{size / 2**30:.2f} GiB"
