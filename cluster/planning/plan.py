"""Which processes a model should have on GPUs of one type, and what they would do. Arithmetic over `roofline`.

A layout is groups of experts and a number of coordinators, each on a GPU of its own or, shared, the coordinators on
the shards'; or, local, coordinators alone, each with all experts. Of all that fit, the one with the fewest GPUs that
reach the target is taken, or without a target the one with the most tokens per GPU. The rival is local coordinators
where one GPU holds the whole model. Elsewhere it is none of ours: tensor parallelism over the fewest GPUs that hold it,
split evenly, with two sums a layer over NVLink where the GPUs have it. Ours pass rows through the host, by PCIe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf
from typing import Literal

from cluster.errors import DoesNotFit
from cluster.planning.costs import ASSUMED, LANES, Costs
from cluster.planning.gpus import GPUS, GpuType
from cluster.planning.placement import DTYPE_BYTES, ExpertGroup, gib, plan_groups
from cluster.planning.roofline import (
    Link,
    Load,
    Model,
    attention_s,
    cache_bytes,
    disaggregated_s,
    experts_s,
    local_s,
    prefill_s,
    wire_s,
)

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA itself, activations and the allocator's gaps
MAX_COORDINATORS = 64
SWEEP = tuple(2**power for power in range(13))  # sequences


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted."""

    load: Load
    step_s: float = inf  # a token of each sequence, at most
    gpus: int | None = None  # at most


@dataclass(frozen=True)
class Layout:
    """Processes, and where they are."""

    groups: tuple[ExpertGroup, ...]
    coordinators: int
    shared: bool = False  # coordinators are on the shards' GPUs

    @property
    def local(self) -> bool:
        """Whether each coordinator has all experts itself, or is all of a dense model."""
        return not self.groups

    @property
    def gpus(self) -> int:
        """Of all processes."""
        return len(self.groups) if self.shared else len(self.groups) + self.coordinators

    @cached_property
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
    """One number of sequences, on the layout and on as many GPUs of the rival. None: it does not fit."""

    sequences: int
    step_s: float | None
    rival_step_s: float | None
    tokens_per_gpu: float | None  # a second
    rival_tokens_per_gpu: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout, and what is expected of it."""

    layout: Layout
    processes: tuple[Process, ...]
    floor_s: float  # one sequence: the bytes that its token needs, at the memory's bandwidth
    step_s: float  # the target's sequences
    attention_s: float  # a coordinator's part of that
    experts_s: float  # the slowest shard's
    wire_s: float  # of rows on their way
    host_s: float  # Python and launches; where all experts are local, of a step that is captured, meanwhile
    first_token_s: float  # of a prompt as long as the target's context, when nothing else runs
    meets_target: bool
    rival: Literal["local", "tensor parallelism"] | None  # None: the layout is the rival
    rival_gpus: int
    comparisons: tuple[Comparison, ...]

    @property
    def attention_per_expert_gpu(self) -> float:
        """Coordinators for each GPU with experts."""
        return self.layout.coordinators / len(self.layout.groups) if self.layout.groups else inf

    @property
    def loses_at(self) -> tuple[int, ...]:
        """The numbers of sequences at which the rival makes more tokens per GPU."""
        return tuple(
            one.sequences for one in self.comparisons if (one.rival_tokens_per_gpu or 0.0) > (one.tokens_per_gpu or 0.0)
        )


@dataclass(frozen=True, slots=True)
class Planner:
    """What does not change from layout to layout."""

    model: Model
    gpu: GpuType  # as its data sheet has it
    lanes: Link = LANES  # between processes, without copies to and from GPUs
    costs: Costs = ASSUMED

    @property
    def usable_bytes(self) -> float:
        """Of a GPU."""
        return USABLE * self.gpu.memory_bytes

    @property
    def host_s(self) -> float:
        """Python and launches of a step, one by one."""
        return self.costs.layer_s * self.model.architecture.num_layers

    @property
    def link(self) -> Link:
        """Between rows on two GPUs: through the host, whether they have NVLink or not."""
        return self.costs.between_devices(self.lanes, self.gpu, gpus=2)

    @property
    def _reached(self) -> GpuType:
        """What kernels make of a GPU."""
        return self.costs.reached(self.gpu)

    def plan(self, target: Target) -> Plan:
        """The best of all layouts. Raises DoesNotFit when none does."""
        layouts = [one for one in self._layouts(target) if target.gpus is None or one.gpus <= target.gpus]
        if not layouts:
            on = f"{target.gpus} of them" if target.gpus else "any number of them"
            raise DoesNotFit(
                f"{self.gpu.name} has {gib(self.usable_bytes)} to use: no layout for "
                f"{target.load.sequences:g} sequences of {target.load.context} tokens fits {on}. "
                f"{self.what_holds_it(target.load.context)}"
            )
        return self.evaluate(min(layouts, key=lambda layout: self._rank(layout, target)), target)

    def what_holds_it(self, context: int) -> str:
        """How much the weights are, the fewest GPUs of each type for them and one sequence, and what else there is."""
        fewest = {name: replace(self, gpu=gpu).fewest_gpus(context) for name, gpu in GPUS.items()}
        smaller = (
            "--quantization fp8, int8 or int4 makes them smaller; with --ram " if self.model.is_plain else "With --ram "
        )
        fits = ", ".join(f"{number} × {name}" for name, number in fewest.items() if number is not None)
        return (
            f"The weights are {gib(self.model.all_bytes)} there ({self.model.all_bytes / 1e9:.0f} GB); with one "
            f"sequence they fit {fits or 'no number of GPUs of any type'}. {smaller}some experts are in a CPU's memory"
        )

    def fewest_gpus(self, context: int) -> int | None:
        """That hold the model and one sequence of so many tokens."""
        load, num_experts = Load(1, context), self.model.architecture.num_experts
        layouts = [Layout((), 1)]
        for number in _numbers_of_groups(num_experts):
            groups = plan_groups("auto", num_experts, number, 1)
            layouts += [Layout(groups, 1, shared=True), Layout(groups, 1)]
        return min((layout.gpus for layout in layouts if self._fits(layout, load)), default=None)

    def evaluate(self, layout: Layout, target: Target) -> Plan:
        """What one layout would do. Raises DoesNotFit."""
        processes = tuple(self._processes(layout, target.load))
        for gpu in range(layout.gpus):
            used = sum(one.weight_bytes + one.cache_bytes for one in processes if one.gpu == gpu)
            if used > self.usable_bytes:
                names = " and ".join(one.name for one in processes if one.gpu == gpu)
                raise DoesNotFit(
                    f"{names} need {gib(used)}, and {self.gpu.name} has {gib(self.usable_bytes)} to use. "
                    f"{self.what_holds_it(target.load.context)}"
                )
        load = target.load
        own = Load(load.sequences / layout.coordinators, load.context)
        step_s, groups = self._step_s(layout, load), self._sizes(layout)
        rows = own.sequences if layout.local else load.sequences
        return Plan(
            layout=layout,
            processes=processes,
            floor_s=attention_s(self.model, self.gpu, Load(1, load.context))
            + max((experts_s(self.model, self.gpu, 1, size) for size in groups), default=0.0),
            step_s=step_s,
            attention_s=attention_s(self.model, self._reached, own),
            experts_s=self._experts_s(layout, rows),
            wire_s=0.0 if layout.local else wire_s(self.model, self.link, own.sequences, groups),
            host_s=self.costs.captured.value if layout.local else self.host_s,
            first_token_s=prefill_s(
                self.model,
                self._reached,
                None if layout.local else self.link,
                load.context,
                groups,
                self.host_s,
            ),
            meets_target=step_s <= target.step_s,
            rival=None if layout.local else "local" if self._rival_gpus(load.context) == 1 else "tensor parallelism",
            rival_gpus=self._rival_gpus(load.context),
            comparisons=() if layout.local else tuple(self._compare(layout, one, load.context) for one in SWEEP),
        )

    def _layouts(self, target: Target) -> Iterator[Layout]:
        """Every one whose processes fit, with no more coordinators than shorten a step."""
        num_experts = self.model.architecture.num_experts
        most = int(min(MAX_COORDINATORS, max(1, target.load.sequences)))
        yield from (one for one in (Layout((), n) for n in range(1, most + 1)) if self._fits(one, target.load))
        numbers = _numbers_of_groups(num_experts)
        # Coordinators are on no more of the experts' GPUs than there are.
        for number in sorted({*numbers, *range(1, min(most, num_experts) + 1)}):
            groups = plan_groups("auto", num_experts, number, 1)
            for shared in (False, True) if number in numbers else (True,):
                for coordinators in range(1, min(most, number) + 1 if shared else most + 1):
                    layout = Layout(groups, coordinators, shared)
                    if not self._fits(layout, target.load):
                        continue
                    yield layout
                    own = Load(target.load.sequences / coordinators, target.load.context)
                    attention = attention_s(self.model, self._reached, own)
                    if not shared and attention <= self._experts_s(layout, target.load.sequences):
                        break  # the experts are what a step waits for; on one GPU they take turns

    def _rank(self, layout: Layout, target: Target) -> tuple[float, ...]:
        """Smaller is better."""
        step_s = self._step_s(layout, target.load)
        if target.step_s == inf:
            return step_s * layout.gpus, layout.gpus
        return (0, layout.gpus, step_s) if step_s <= target.step_s else (1, step_s, layout.gpus)

    def _processes(self, layout: Layout, load: Load) -> Iterator[Process]:
        for group in layout.groups:
            yield Process(f"expert-{group.index}", group.index, len(group.experts) * self.model.one_expert_bytes, 0)
        cache = cache_bytes(self.model, load, layout.coordinators)
        first = 0 if layout.shared else len(layout.groups)
        for index in range(layout.coordinators):
            yield Process(f"coordinator {index}", first + index, self._coordinator_bytes(layout), cache)

    def _coordinator_bytes(self, layout: Layout) -> int:
        """Weights of one."""
        return self.model.all_bytes if layout.local else self.model.coordinator_bytes

    def _fits(self, layout: Layout, load: Load) -> bool:
        shard = max(layout.sizes, default=0) * self.model.one_expert_bytes
        coordinator = self._coordinator_bytes(layout) + cache_bytes(self.model, load, layout.coordinators)
        return (shard + coordinator if layout.shared else max(shard, coordinator)) <= self.usable_bytes

    def _sizes(self, layout: Layout) -> tuple[int, ...]:
        """Experts of each process that has some."""
        return layout.sizes or (self.model.architecture.num_experts,)

    def _step_s(self, layout: Layout, load: Load) -> float:
        gpu = self._reached
        if layout.local:
            own = Load(load.sequences / layout.coordinators, load.context)
            return local_s(self.model, gpu, own, self.costs.captured.value)
        return disaggregated_s(
            self.model,
            gpu,
            self.link,
            load,
            layout.sizes,
            layout.coordinators,
            shared=layout.shared,
            host_s=self.host_s,
        )

    def _experts_s(self, layout: Layout, rows: float) -> float:
        gpu = self._reached
        return max(experts_s(self.model, gpu, rows, size) for size in set(self._sizes(layout)))

    def _rival_gpus(self, context: int) -> int:
        """The fewest that hold everything and one sequence, split evenly."""
        return ceil((self.model.all_bytes + cache_bytes(self.model, Load(1, context))) / self.usable_bytes)

    def _compare(self, layout: Layout, sequences: int, context: int) -> Comparison:
        load, gpus = Load(sequences, context), self._rival_gpus(context)
        own = Load(max(1.0, sequences * gpus / layout.gpus), context)  # a rival's part, on as many GPUs in all
        step_s = self._step_s(layout, load) if self._fits(layout, load) else None
        fits = self.model.all_bytes + cache_bytes(self.model, own) <= gpus * self.usable_bytes
        rival_step_s = None
        if fits:
            a = self.model.architecture
            row_bytes = own.sequences * a.hidden_size * DTYPE_BYTES[self.model.dtype]
            hops_s = self.costs.hops_s(self.gpu, a.num_layers, row_bytes, gpus)
            rival_step_s = local_s(self.model, self._reached, own, self.costs.captured.value, gpus) + hops_s
        return Comparison(
            sequences,
            step_s,
            rival_step_s,
            None if step_s is None else sequences / step_s / layout.gpus,
            None if rival_step_s is None else sequences / rival_step_s / layout.gpus,
        )


def _numbers_of_groups(num_experts: int) -> list[int]:
    """The fewest for each size of the largest group: with more of them a step takes no less, on more GPUs."""
    fewest: dict[int, int] = {}
    for number in range(1, num_experts + 1):
        fewest.setdefault(ceil(num_experts / number), number)
    return list(fewest.values())


def group_list(groups: Sequence[ExpertGroup]) -> list[list[int]]:
    """As `experts.groups` has them."""
    return [list(group.experts) for group in groups]
