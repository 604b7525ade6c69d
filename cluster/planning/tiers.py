"""What a step takes where experts are on GPUs and in the memory of CPUs. Arithmetic over `roofline`; proposes nothing.

Each expert has a chance to be asked for by a row; all together those of top_k experts. A step waits for the
coordinator, then for the rows on their way and for the slower side:

    GPUs    each card reads what is asked for of the groups on it
    CPUs    groups of one machine share its memory and its cores; small numbers are as much faster as was measured
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.planning.costs import ASSUMED, LANES, LAYER_S, Costs, kernel_speed
from cluster.planning.gpus import GpuType
from cluster.planning.placement import DTYPE_BYTES
from cluster.planning.roofline import CHUNK, Link, Load, Model, attention_s, chunk_attention_s


@dataclass(frozen=True, slots=True)
class Cpus:
    """Of one machine."""

    bandwidth: float  # bytes a second, of the memory
    flops: float  # bf16, a second, of all cores


@dataclass(frozen=True, slots=True)
class Shard:
    """One group on one tier."""

    name: str
    experts: tuple[int, ...]
    device: Literal["cpu", "cuda"]
    gpus: float
    machine: Mapping[str, str]  # labels of the nodes that it may be on: equal ones share CPUs
    expert_bytes: int  # of one expert, as the device holds it
    bits: int  # of a number there
    share: float = 1.0  # of the group's rows; the others go to other tiers
    shares_memory: bool = False  # with the coordinator: rows lie there, and are not sent over a lane


@dataclass(frozen=True, slots=True)
class Times:
    """Of one step, in seconds."""

    attention_s: float
    gpu_s: float  # the slowest card's experts
    cpu_s: float  # the slowest machine's
    wire_s: float
    host_s: float
    waits: bool = True  # the host, for experts elsewhere, in every layer

    @property
    def all_s(self) -> float:
        """Both sides compute at once; and where nothing waits, the host goes ahead meanwhile."""
        computed = self.attention_s + max(self.gpu_s, self.cpu_s) + self.wire_s
        return computed + self.host_s if self.waits else max(computed, self.host_s)


def chances(rows: Sequence[float] | None, num_experts: int, top_k: int) -> tuple[float, ...]:
    """That a row asks for each expert, from the rows that were observed. None: all alike."""
    if not num_experts:
        return ()
    if rows is None:
        return (top_k / num_experts,) * num_experts
    return tuple(min(1.0, top_k * one / sum(rows)) for one in rows)


@dataclass(frozen=True)
class TieredModel:
    """A model on tiers."""

    model: Model  # as the coordinator holds it
    on_gpu: bool  # the coordinator
    gpu: GpuType  # as its data sheet has it
    cpus: Cpus
    shards: Sequence[Shard]
    chances: Sequence[float]  # that a row asks for each expert
    lanes: Link | None = field(default=LANES)  # None: all experts are in the coordinator
    costs: Costs = ASSUMED

    @property
    def _near(self) -> GpuType:
        """What the coordinator computes on."""
        if self.on_gpu:
            return self.costs.reached(self.gpu)
        return replace(self.gpu, bandwidth=self.cpus.bandwidth, flops=self.cpus.flops)

    @property
    def host_s(self) -> float:
        """Python and launches of a step."""
        return self.costs.captured.value if self._captured else self._one_by_one_s

    @property
    def _one_by_one_s(self) -> float:
        """The same of a step that is not captured, as no prompt's is."""
        on_cpus = self.lanes is None and not self.on_gpu
        return (LAYER_S.value if on_cpus else self.costs.layer_s) * self.model.architecture.num_layers

    @property
    def _captured(self) -> bool:
        """Whether a step is one CUDA graph, which waits for nothing."""
        return self.lanes is None and self.on_gpu

    def step(self, load: Load) -> Times:
        """One token for each sequence."""
        return self._times(attention_s(self.model, self._near, load), load.sequences)

    def first_token_s(self, tokens: int) -> float:
        """Of a prompt of so many, when nothing else runs."""
        seconds = 0.0
        for start in range(0, tokens, CHUNK):
            rows = min(CHUNK, tokens - start)
            times = self._times(chunk_attention_s(self.model, self._near, start, rows), rows)
            seconds += replace(times, host_s=self._one_by_one_s).all_s
        return seconds

    def _times(self, attention: float, rows: float) -> Times:
        on_gpus = [(self._gpu_s(shard, rows), min(1.0, shard.gpus)) for shard in self.shards if shard.device == "cuda"]
        machines: dict[tuple[tuple[str, str], ...], float] = {}
        for shard in self.shards:
            if shard.device == "cpu":
                labels = tuple(sorted(shard.machine.items()))
                machines[labels] = machines.get(labels, 0.0) + self._cpu_s(shard, rows)
        return Times(
            attention,
            # Those that have a half of a card each take turns on it.
            max(max((one for one, _ in on_gpus), default=0.0), sum(one * share for one, share in on_gpus if share < 1)),
            max(machines.values(), default=0.0),
            self._wire_s(rows),
            self.host_s,
            waits=not self._captured,
        )

    def _asked(self, shard: Shard, rows: float) -> tuple[float, float]:
        """How many of the shard's experts at least one of the rows asks for in a layer, and by how many rows in all."""
        mine = [self.chances[expert] * shard.share for expert in shard.experts]
        return sum(1 - (1 - chance) ** rows for chance in mine), rows * sum(mine)

    def _gpu_s(self, shard: Shard, rows: float) -> float:
        gpu, (touched, asked) = self.costs.reached(self.gpu), self._asked(shard, rows)
        computed = 2 * asked * self.model.one_expert_parameters
        return max(touched * shard.expert_bytes / gpu.bandwidth, computed / gpu.flops)

    def _cpu_s(self, shard: Shard, rows: float) -> float:
        touched, asked = self._asked(shard, rows)
        if not touched:
            return 0.0
        plain = self.model.one_expert_parameters * DTYPE_BYTES[self.model.dtype]
        read = touched * plain / self.cpus.bandwidth / kernel_speed(shard.bits, asked / touched)
        return max(read, 2 * asked * self.model.one_expert_parameters / self.cpus.flops)

    def _wire_s(self, rows: float) -> float:
        """Rows and answers, all layers. A row goes once to a group, whichever of its experts it asks for."""
        if self.lanes is None:
            return 0.0
        a, copies = self.model.architecture, 2 * self.costs.copy.value
        row_bytes = a.hidden_size * DTYPE_BYTES[self.model.dtype]
        layer = self.lanes.dispatch_s + copies * self.on_gpu
        for shard in self.shards:
            chance = shard.share * min(1.0, sum(self.chances[expert] for expert in shard.experts))
            on_gpu = shard.device == "cuda"
            link = self.lanes
            if shard.shares_memory:
                link = replace(link, bandwidth=self.costs.memory_bandwidth.value)
            bandwidth = self.costs.between_devices(link, self.gpu, self.on_gpu + on_gpu).bandwidth
            layer += (1 - (1 - chance) ** rows) * (self.lanes.group_s + copies * on_gpu)
            layer += 2 * rows * chance * row_bytes / bandwidth
        return a.num_expert_layers * layer
