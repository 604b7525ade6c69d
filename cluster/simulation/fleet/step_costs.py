"""How long a step of a coordinator takes, and how much of it each shard computes. Arithmetic over the planner's.

    whole    max(host, (attention + experts) / GPUs) + sums between GPUs          all experts in one process
    split    host + attention + wire + experts, layer after layer                 experts elsewhere

What is the planner's is taken from it (`attention_s`, `chunk_attention_s`, `wire_s`, `hops_s`). Experts are counted by
layer and with a chance for each, as `planning.tiers` does for all layers together: L layers, E experts, G groups, X
stations. A station is a GPU, or a machine's CPUs: shards on one of them take turns. A layer waits for the slowest
station; all layers one after the other.

Rows of several coordinators meet at a shard, which reads its weights once for all of them: that is what the planner
takes for granted (`meet`). Without it each coordinator's rows wait for those of the others (Schweitzer's approximation
of a closed network, 1979), and weights are read for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import frexp

import numpy as np
from numpy.typing import NDArray

from cluster.planning.costs import Costs, kernel_speed
from cluster.planning.gpus import GpuType
from cluster.planning.placement import DTYPE_BYTES
from cluster.planning.roofline import Link, Load, Model, attention_s, chunk_attention_s, wire_s
from cluster.planning.tiers import Cpus
from cluster.simulation.fleet.popularity import Chances

SPLIT_ROWS = 64  # as experts_service.delivery.replica_load has it: fewest rows that are worth a replica of their own
ROUNDS = 40  # of the closed network's fixed point, which has settled long before

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Hardware:
    """What a fleet is made of."""

    gpu: GpuType  # as its data sheet has it; of a coordinator on CPUs, what those are
    costs: Costs
    cpus: Cpus  # of one machine beside GPUs
    lanes: Link
    on_gpu: bool = True

    @cached_property
    def reached(self) -> GpuType:
        """What kernels make of the device that coordinators compute on."""
        return self.costs.reached(self.gpu) if self.on_gpu else self.gpu

    @cached_property
    def link(self) -> Link:
        """Between a coordinator and a shard."""
        return self.costs.between_devices(self.lanes, self.gpu, gpus=2) if self.on_gpu else self.lanes


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one coordinator."""

    decodes: float = 0.0  # sequences that get a token
    context: float = 0.0  # tokens of each, in the cache
    chunk: float = 0.0  # tokens of a prompt beside them
    chunk_start: float = 0.0  # tokens of that prompt before those

    @property
    def rows(self) -> float:
        """Tokens in all."""
        return self.decodes + self.chunk


def near_s(model: Model, gpu: GpuType, work: Work) -> float:
    """Attention, gate and head. Weights are read once for decoding sequences and a chunk; the rest adds up."""
    seconds = 0.0
    if work.decodes:
        seconds = attention_s(model, gpu, Load(work.decodes, round(work.context)))
    if work.chunk:
        seconds += chunk_attention_s(model, gpu, round(work.chunk_start), round(work.chunk))
        if work.decodes:
            seconds -= model.attention_bytes / gpu.bandwidth
    return seconds


def of_experts(chances: Chances, rows: float) -> tuple[Seconds, Seconds]:
    """How many of these experts at least one of the rows asks for, and by how many rows in all; of each layer. [L]"""
    touched = 1 - (1 - chances) ** rows  # [L, e]
    return touched.sum(axis=1), rows * chances.sum(axis=1)


def gpu_s(model: Model, gpu: GpuType, chances: Chances, rows: float, expert_bytes: int) -> Seconds:
    """Of a GPU that holds the experts with these chances, for each layer: read what is asked for, compute it. [L]"""
    layers = model.architecture.num_expert_layers
    touched, asked = of_experts(chances, rows)
    read = touched * (expert_bytes / layers / gpu.bandwidth)
    computed = asked * (2 * model.one_expert_parameters / layers / gpu.flops)
    return np.maximum(read, computed)


def cpu_s(model: Model, cpus: Cpus, chances: Chances, rows: float, bits: int) -> Seconds:
    """The same of a machine's CPUs. [L]"""
    layers = model.architecture.num_expert_layers
    touched, asked = of_experts(chances, rows)
    plain = model.one_expert_parameters * DTYPE_BYTES[model.dtype] / layers
    speed = kernel_speed(bits, float(asked.sum() / max(touched.sum(), 1e-9)))
    computed = asked * (2 * model.one_expert_parameters / layers / cpus.flops)
    return np.maximum(touched * (plain / cpus.bandwidth / speed), computed)


@dataclass(frozen=True)
class WholeCosts:
    """Of a replica of the whole model on so many GPUs, which split it evenly."""

    model: Model
    hardware: Hardware
    gpus: int

    def step_s(self, work: Work, chances: Chances) -> float:
        """Nothing waits for the host, which goes ahead; steps that only decode are one CUDA graph."""
        a, costs, gpu = self.model.architecture, self.hardware.costs, self.hardware.reached
        computed = near_s(self.model, gpu, work)
        if a.num_experts:
            computed += float(gpu_s(self.model, gpu, chances, work.rows, self.model.one_expert_bytes).sum())
        captured = self.hardware.on_gpu and not work.chunk
        host_s = costs.captured.value if captured else costs.layer_s * a.num_layers
        hops_s = costs.hops_s(
            self.hardware.gpu, a.num_layers, work.rows * a.hidden_size * DTYPE_BYTES[self.model.dtype], self.gpus
        )
        if not self.hardware.on_gpu:
            return host_s + computed
        return max(host_s, computed / self.gpus) + hops_s


@dataclass(frozen=True)
class Group:
    """One expert group as its tier holds it."""

    experts: tuple[int, ...]
    expert_bytes: int
    on_gpu: bool = True
    bits: int = 16


@dataclass(frozen=True)
class Stations:
    """Where shards compute: for each replica of each group its station, by number."""

    of_group: tuple[tuple[int, ...], ...]

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """The groups with a replica at a station, in each combination that there is once."""
        return tuple(sorted(set(self._members.values())))

    @cached_property
    def of_replicas(self) -> tuple[tuple[int, ...], ...]:
        """For each replica of each group the kind of its station, by its place in `kinds`."""
        places = {kind: place for place, kind in enumerate(self.kinds)}
        return tuple(tuple(places[self._members[station]] for station in at) for at in self.of_group)

    @cached_property
    def _members(self) -> dict[int, tuple[int, ...]]:
        members: dict[int, tuple[int, ...]] = {}
        for index, at in enumerate(self.of_group):
            assert len(set(at)) == len(at), "replicas of a group are apart"
            for station in at:
                members[station] = (*members.get(station, ()), index)
        return members


@dataclass(frozen=True, slots=True)
class Experts:
    """What the experts' side of a step takes."""

    step_s: float  # that one coordinator waits, all layers
    busy_s: tuple[float, ...]  # of each group's replicas on average, for one step of every coordinator
    queue_s: tuple[float, ...]  # a dispatch of each group waits for its turn


@dataclass
class SplitCosts:
    """Of a coordinator whose experts are in shards of their own."""

    model: Model
    hardware: Hardware
    groups: Sequence[Group]
    meet: bool = True
    microbatches: int = 1
    _of_group: dict[tuple[int, float, int], Seconds] = field(default_factory=dict)  # group, rows, popularity → [L]
    _chances: dict[tuple[int, int], float] = field(default_factory=dict)  # group, popularity
    _own_s: dict[Work, float] = field(default_factory=dict)
    _wire_s: dict[float, float] = field(default_factory=dict)  # by rows

    @cached_property
    def host_s(self) -> float:
        """Of the coordinator, for each step, or each half of one."""
        return self.hardware.costs.layer_s * self.model.architecture.num_layers

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Experts of each group."""
        return tuple(len(group.experts) for group in self.groups)

    @cached_property
    def _one_expert_s(self) -> float:
        """Read in all layers, where that is soonest."""
        read = self.model.one_expert_bytes / self.hardware.cpus.bandwidth
        on_gpus = [one.expert_bytes / self.hardware.reached.bandwidth for one in self.groups if one.on_gpu]
        return min([*on_gpus, read])

    def own_s(self, work: Work) -> float:
        """The coordinator's part, and rows on their way."""
        found = self._own_s.get(work)
        if found is None:
            near = near_s(self.model, self.hardware.reached, work)
            found = self._own_s[work] = self.host_s + near + self.wire_s(work.rows)
        return found

    def wire_s(self, rows: float) -> float:
        """Rows of one coordinator to the shards and back, all layers."""
        found = self._wire_s.get(rows)
        if found is None:
            found = self._wire_s[rows] = wire_s(self.model, self.hardware.link, rows, self.sizes)
        return found

    def step_s(self, work: Work, experts_s: float) -> float:
        """A step, whole or in two halves that take turns. `experts_s`: with all its rows."""
        whole = self.own_s(work) + experts_s
        if self.microbatches == 1 or work.rows < 2:
            return whole
        half = Work(work.decodes / 2, work.context, work.chunk / 2, work.chunk_start)
        wire = self.wire_s(half.rows)
        near = self.own_s(half) - wire
        far = wire + experts_s / 2  # generous: weights are read twice
        return min(whole, max(2 * near, 2 * far, near + far))

    def group_s(self, index: int, rows: float, chances: Chances, version: int) -> Seconds:
        """What one replica of a group computes for so many rows of a layer, before its gate chooses. [L]"""
        key = (index, rows, version)
        found = self._of_group.get(key)
        if found is None:
            group = self.groups[index]
            mine = chances[:, group.experts]
            if group.on_gpu:
                found = gpu_s(self.model, self.hardware.reached, mine, rows, group.expert_bytes)
            else:
                found = cpu_s(self.model, self.hardware.cpus, mine, rows, group.bits)
            self._of_group[key] = found
        return found

    def forget(self) -> None:
        """What was computed for a popularity that has changed."""
        self._of_group.clear()
        self._chances.clear()

    def experts(
        self, rows: float, coordinators: int, stations: Stations, chances: Chances, version: int, other_s: float
    ) -> Experts:
        """Of so many coordinators with `rows` each in a step that takes `other_s` beside experts.

        Where rows meet, all of them are one batch, of which a replica has its part: as many replicas as there are
        coordinators, or as many as have 64 rows each. Else each coordinator is alone, and the others are in its way.
        A replica that a step does not use is in nobody's way: on average it is there as often as it is used.
        """
        layers = len(chances)
        together = rows * coordinators if self.meet else rows
        alone: list[Seconds] = []
        used: list[Seconds] = []  # on average over the replicas of a group
        for index, at in enumerate(stations.of_group):
            if not at:  # another tier has its rows
                alone.append(np.zeros(layers))
                used.append(alone[-1])
                continue
            asked = together * self._chance(index, chances, version)
            ways = max(1, min(len(at), max(coordinators if self.meet else 1, int(asked // SPLIT_ROWS))))
            alone.append(self.group_s(index, rounded(together / ways), chances, version))
            used.append(alone[-1] * (ways / len(at)))
        at_kinds = [np.sum([used[index] for index in kind], axis=0) for kind in stations.kinds]
        waited = [
            np.maximum(at_kind, np.max([alone[index] for index in kind], axis=0)) if len(kind) > 1 else alone[kind[0]]
            for kind, at_kind in zip(stations.kinds, at_kinds, strict=True)
        ]
        slowest = float(np.max(waited, axis=0).sum())
        # Of a batch that asks few shards, a layer still waits for one expert of those that it asks.
        alone_s = max(slowest, self._one_expert_s * min(1.0, rows))
        busy = [float(at_kind.sum()) for at_kind in at_kinds]  # of one step of everybody if they meet, else of one's
        step_s, queue_s = other_s + alone_s, 0.0
        if not self.meet and coordinators > 1:
            step_s = _closed(other_s, alone_s, max(busy, default=0.0), coordinators)
            queue_s = (step_s - other_s - alone_s) / layers
            busy = [coordinators * one for one in busy]
        of_groups = tuple(sum(busy[kind] for kind in kinds) / max(1, len(kinds)) for kinds in stations.of_replicas)
        return Experts(step_s - other_s, of_groups, (queue_s,) * len(self.groups))

    def _chance(self, index: int, chances: Chances, version: int) -> float:
        """How many of a group's experts a row asks for, on average over layers."""
        found = self._chances.get((index, version))
        if found is None:
            found = float(chances[:, self.groups[index].experts].sum()) / len(chances)
            self._chances[index, version] = found
        return found


def _closed(other_s: float, alone_s: float, own_s: float, coordinators: int) -> float:
    """How long a step takes where coordinators wait for each other at the busiest station.

    Each of N is at that station for R of a step of T seconds, and finds what the N - 1 others have there:
    R = S · (1 + (N - 1) · R / T), with S its own time there.
    """
    step_s = other_s + alone_s
    for _ in range(ROUNDS):
        there = min(coordinators * own_s, own_s / max(1e-9, 1 - (coordinators - 1) * own_s / step_s))
        step_s = other_s + alone_s - own_s + there
    return step_s


def rounded(number: float) -> float:
    """So that few different ones are computed: within 3 %, or an eighth."""
    if number < 8:
        return max(0.125, round(number * 8) / 8)
    step = 2.0 ** (frexp(number)[1] - 5)
    return round(number / step) * step
