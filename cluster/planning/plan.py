"""Which processes a model should have on GPUs of one type, and what they would do. Arithmetic over `roofline`.

A layout is groups of experts and a number of coordinators, each on a GPU of its own or, shared, the coordinators on
the shards'. Of all that fit, the one with the fewest GPUs that reach the target is taken, or without a target the one
with the most tokens per GPU. The rival is one fat replica: the fewest GPUs that hold the whole model in one process,
split over them evenly and at no cost, which is better than any real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf

from cluster.errors import DoesNotFit
from cluster.planning.gpus import GpuType
from cluster.planning.placement import ExpertGroup, gib, kv_bytes_per_token, plan_groups
from cluster.planning.roofline import Link, Load, Model, attention_s, disaggregated_s, experts_s, replica_s

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA itself, activations and the allocator's gaps
MAX_COORDINATORS = 64
SWEEP = tuple(2**power for power in range(13))  # sequences


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted."""

    load: Load
    step_s: float = inf  # a token of each sequence, at most
    gpus: int | None = None  # at most


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes, and where they are."""

    groups: tuple[ExpertGroup, ...]
    coordinators: int
    shared: bool = False  # coordinators are on the shards' GPUs

    @property
    def gpus(self) -> int:
        """Of all processes."""
        return len(self.groups) if self.shared else len(self.groups) + self.coordinators

    @property
    def sizes(self) -> tuple[int, ...]:
        """Experts of each group."""
        return tuple(len(group.experts) for group in self.groups)


@dataclass(frozen=True, slots=True)
class Process:
    """One process, with what it holds on its GPU."""

    name: str
    gpu: int
    weight_bytes: int
    cache_bytes: int  # of the sequences that are its part of the target


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of sequences, on the layout and on as many GPUs of fat replicas. None: it does not fit."""

    sequences: int
    step_s: float | None
    replica_step_s: float | None
    tokens_per_gpu: float | None  # a second
    replica_tokens_per_gpu: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout, and what is expected of it."""

    layout: Layout
    processes: tuple[Process, ...]
    floor_s: float  # one sequence: the bytes that its token needs, at the memory's bandwidth
    step_s: float  # the target's sequences
    attention_s: float  # a coordinator's part of that
    experts_s: float  # the slowest shard's
    meets_target: bool
    replica_gpus: int
    comparisons: tuple[Comparison, ...]

    @property
    def attention_per_expert_gpu(self) -> float:
        """Coordinators for each GPU with experts."""
        return self.layout.coordinators / len(self.layout.groups) if self.layout.groups else inf

    @property
    def loses_until(self) -> int | None:
        """The largest number of sequences at which fat replicas make more tokens per GPU. None: at no one."""
        lost = [
            one.sequences
            for one in self.comparisons
            if (one.replica_tokens_per_gpu or 0.0) > (one.tokens_per_gpu or 0.0)
        ]
        return max(lost, default=None)


@dataclass(frozen=True, slots=True)
class Planner:
    """What does not change from layout to layout."""

    model: Model
    gpu: GpuType
    link: Link

    def plan(self, target: Target) -> Plan:
        """The best of all layouts. Raises DoesNotFit when none does."""
        layouts = [one for one in self._layouts(target) if target.gpus is None or one.gpus <= target.gpus]
        if not layouts:
            on = f"{target.gpus} of them" if target.gpus else "any number of them"
            raise DoesNotFit(
                f"{self.gpu.name} has {gib(USABLE * self.gpu.memory_bytes)} to use: no layout for "
                f"{target.load.sequences:g} sequences of {target.load.context} tokens fits {on}"
            )
        return self.evaluate(min(layouts, key=lambda layout: self._rank(layout, target)), target)

    def evaluate(self, layout: Layout, target: Target) -> Plan:
        """What one layout would do. Raises DoesNotFit."""
        processes = tuple(self._processes(layout, target.load))
        for gpu in range(layout.gpus):
            used = sum(one.weight_bytes + one.cache_bytes for one in processes if one.gpu == gpu)
            if used > USABLE * self.gpu.memory_bytes:
                names = " and ".join(one.name for one in processes if one.gpu == gpu)
                raise DoesNotFit(
                    f"{names} need {gib(used)}, and {self.gpu.name} has {gib(USABLE * self.gpu.memory_bytes)} to use"
                )
        one, load = Load(1, target.load.context), target.load
        step_s = self._step_s(layout, load)
        return Plan(
            layout=layout,
            processes=processes,
            floor_s=attention_s(self.model, self.gpu, one) + self._experts_s(layout, 1),
            step_s=step_s,
            attention_s=attention_s(self.model, self.gpu, Load(load.sequences / layout.coordinators, load.context)),
            experts_s=self._experts_s(layout, load.sequences),
            meets_target=step_s <= target.step_s,
            replica_gpus=self._replica_gpus(load.context),
            comparisons=tuple(self._compare(layout, sequences, load.context) for sequences in SWEEP),
        )

    def _layouts(self, target: Target) -> Iterator[Layout]:
        """Every one whose processes fit, with no more coordinators than shorten a step."""
        num_experts = self.model.architecture.num_experts
        most = int(min(MAX_COORDINATORS, max(1, target.load.sequences)))
        for number in range(1, num_experts + 1) if num_experts else (0,):
            groups = plan_groups("auto", num_experts, number, 1)
            for shared in (False, True):
                for coordinators in range(1, min(most, number) + 1 if shared else most + 1):
                    layout = Layout(groups, coordinators, shared)
                    if not self._fits(layout, target.load):
                        continue
                    yield layout
                    own = Load(target.load.sequences / coordinators, target.load.context)
                    if attention_s(self.model, self.gpu, own) <= self._experts_s(layout, target.load.sequences):
                        break  # the experts are what a step waits for

    def _rank(self, layout: Layout, target: Target) -> tuple[float, ...]:
        """Smaller is better."""
        step_s = self._step_s(layout, target.load)
        if target.step_s == inf:
            return step_s * layout.gpus, layout.gpus
        return (0, layout.gpus, step_s) if step_s <= target.step_s else (1, step_s, layout.gpus)

    def _processes(self, layout: Layout, load: Load) -> Iterator[Process]:
        for group in layout.groups:
            yield Process(f"expert-{group.index}", group.index, len(group.experts) * self.model.one_expert_bytes, 0)
        cache = ceil(self._cache_bytes(load) / layout.coordinators)
        first = 0 if layout.shared else len(layout.groups)
        for index in range(layout.coordinators):
            yield Process(f"coordinator {index}", first + index, self.model.coordinator_bytes, cache)

    def _fits(self, layout: Layout, load: Load) -> bool:
        usable = USABLE * self.gpu.memory_bytes
        shard = max(layout.sizes, default=0) * self.model.one_expert_bytes
        coordinator = self.model.coordinator_bytes + self._cache_bytes(load) / layout.coordinators
        return shard + coordinator <= usable if layout.shared else max(shard, coordinator) <= usable

    def _cache_bytes(self, load: Load) -> float:
        return load.sequences * load.context * kv_bytes_per_token(self.model.architecture, self.model.dtype)

    def _step_s(self, layout: Layout, load: Load) -> float:
        return disaggregated_s(
            self.model, self.gpu, self.link, load, layout.sizes, layout.coordinators, shared=layout.shared
        )

    def _experts_s(self, layout: Layout, rows: float) -> float:
        return max((experts_s(self.model, self.gpu, rows, size) for size in set(layout.sizes)), default=0.0)

    def _replica_gpus(self, context: int) -> int:
        """The fewest that hold everything and one sequence."""
        return ceil((self.model.all_bytes + self._cache_bytes(Load(1, context))) / (USABLE * self.gpu.memory_bytes))

    def _compare(self, layout: Layout, sequences: int, context: int) -> Comparison:
        load, gpus = Load(sequences, context), self._replica_gpus(context)
        own = Load(max(1.0, sequences * gpus / layout.gpus), context)  # a replica's part, on as many GPUs in all
        step_s = self._step_s(layout, load) if self._fits(layout, load) else None
        fits = self.model.all_bytes + self._cache_bytes(own) <= gpus * USABLE * self.gpu.memory_bytes
        replica_step_s = replica_s(self.model, self.gpu, own, gpus) if fits else None
        return Comparison(
            sequences,
            step_s,
            replica_step_s,
            None if step_s is None else sequences / step_s / layout.gpus,
            None if replica_step_s is None else sequences / replica_step_s / layout.gpus,
        )


def group_list(groups: Sequence[ExpertGroup]) -> list[list[int]]:
    """As `experts.groups` has them."""
    return [list(group.experts) for group in groups]
