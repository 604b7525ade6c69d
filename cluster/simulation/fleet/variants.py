"""The ways to serve one model that are compared, of a configuration and hardware.

    whole       (a)  replicas of the whole model, on as many GPUs as hold it
    together    (b)  coordinators, and experts that are all scaled by the busiest group
    single      (c)  coordinators, and each expert group scaled by itself
    tiers       (d)  the same, with groups that are asked for least in the memory of CPUs

Coordinators have GPUs of their own. Shards of less than a GPU share one with other shards. Bounds of replicas are the
configuration's where it scales; what it keeps at one number may have up to `max_replicas`, so that all are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.checkpoint.architecture import compute_dtype, expert_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.config import CoordinatorScalingConfig, ModelConfig, ScalingConfig, TierConfig
from cluster.errors import ConfigError, DoesNotFit
from cluster.planning.placement import gib, kv_bytes_per_token, kv_dtype, plan_groups
from cluster.planning.plan import USABLE
from cluster.planning.roofline import Model
from cluster.planning.weights import held_bits, held_weights
from cluster.simulation.fleet.coordinator import LEAST_PROMPT_TOKENS
from cluster.simulation.fleet.fleet import Fleet, ShardDeployment, placed
from cluster.simulation.fleet.outcome import Objective
from cluster.simulation.fleet.popularity import Popularity
from cluster.simulation.fleet.step_costs import Group, Hardware, SplitCosts, Stations, WholeCosts, Work
from cluster.simulation.fleet.trace import Arrival

WHOLE, TOGETHER, SINGLE, TIERS = NAMES = ("whole", "together", "single", "tiers")
MOST_ON_A_CARD = 8  # shards that share one
AUTO_GROUPS = 8  # of a model with more experts, where nobody says how many
LARGEST_BATCH = 512  # sequences, whatever the configuration has
TUNED = 0.8  # of the objective that a step of a full batch may take: the rest is for what comes together
TYPICAL_SEQUENCES = 8  # of a coordinator, with which experts on CPUs have to keep the objective


@dataclass(frozen=True)
class Options:
    """What no configuration says."""

    max_replicas: int = 64  # where it keeps them fixed
    fixed: bool = False  # nothing is scaled: replicas are those of the configuration
    whole_gpus: int | None = None  # None: the fewest that hold the model
    process_s: float = 20.0  # from a decision to a process that begins to load
    load_bandwidth: float = 2e9  # bytes a second, of weights that are loaded
    meet: bool = True
    request_timeout_s: float = 600.0


@dataclass(frozen=True)
class Served:
    """One model on hardware."""

    config: ModelConfig
    checkpoint: Checkpoint
    hardware: Hardware
    popularity: Popularity
    options: Options

    @property
    def model(self) -> Model:
        """As a coordinator holds it."""
        architecture = self.checkpoint.architecture
        dtype = compute_dtype(self.config.engine.dtype, architecture)
        rounded = self.checkpoint.rounded(self.config.engine.rounding)
        return Model(architecture, dtype, held_weights(rounded, dtype, self._device))

    @property
    def max_model_len(self) -> int:
        """Tokens of a request."""
        return self.config.engine.max_model_len or self.checkpoint.architecture.max_position_embeddings

    def whole(self) -> Fleet:
        """(a). Raises DoesNotFit."""
        model = self.model
        gpus = self.options.whole_gpus or self._fewest(model)
        return Fleet(
            WHOLE,
            self.config.engine,
            WholeCosts(model, self.hardware, gpus),
            self.popularity,
            self._kv_tokens(model, gpus * self._usable, model.all_bytes, f"{gpus} × "),
            self.max_model_len,
            self._bounds(self.config.coordinators),
            self._start_s(model.all_bytes / gpus),
            gpus,
            request_timeout_s=self.options.request_timeout_s,
        )

    def split(self, name: str, objective: Objective) -> Fleet:
        """(b), (c) or (d). Raises DoesNotFit or ConfigError."""
        model, experts = self.model, self.config.experts
        if model.architecture.is_dense:
            raise ConfigError(f"{self.config.path} is dense: it has no experts to scale")
        plain = [tuple(group.experts) for group in self._groups()]
        if name == TIERS and experts.tiers:
            groups, shards = self._of_tiers(plain, model)
        else:
            share = self._share(max(map(len, plain)) * model.one_expert_bytes)
            on_cpus = self._on_cpus(plain, model, objective) if name == TIERS else set()
            groups = [
                Group(one, model.one_expert_bytes, self._gpus and at not in on_cpus) for at, one in enumerate(plain)
            ]
            shards = [
                ShardDeployment(
                    f"expert-{index}",
                    index,
                    self._scaling(experts.group_scaling.get(index, experts.scaling)),
                    self._start_s(len(group.experts) * model.one_expert_bytes),
                    share if group.on_gpu else 0.0,
                )
                for index, group in enumerate(groups)
            ]
        return Fleet(
            name,
            self.config.engine,
            self._split_costs(model, groups),
            self.popularity,
            self._kv_tokens(model, self._usable, model.coordinator_bytes, ""),
            self.max_model_len,
            self._bounds(self.config.coordinators),
            self._start_s(model.coordinator_bytes),
            int(self._gpus),
            tuple(shards),
            together=name == TOGETHER,
            request_timeout_s=self.options.request_timeout_s,
        )

    @property
    def _gpus(self) -> bool:
        return self.hardware.on_gpu

    @property
    def _device(self) -> str:
        return "cuda" if self.hardware.on_gpu else "cpu"

    @property
    def _usable(self) -> float:
        return USABLE * self.hardware.gpu.memory_bytes

    def _split_costs(self, model: Model, groups: Sequence[Group]) -> SplitCosts:
        microbatches = self.config.engine.microbatches
        return SplitCosts(
            model, self.hardware, groups, self.options.meet, 1 if microbatches == "auto" else microbatches
        )

    def _groups(self) -> Any:
        number = self.checkpoint.architecture.num_experts
        return plan_groups(self.config.experts.groups, number, min(number, AUTO_GROUPS), 1)

    def _share(self, held: float) -> float:
        """Of a GPU: as configured, or so that as few as hold all groups have as many each."""
        if not self._gpus:
            return 0.0
        if held > self._usable:
            raise DoesNotFit(
                f"a group of experts needs {gib(held)}, and {self.hardware.gpu.name} has {gib(self._usable)}"
            )
        given = self.config.experts.gpus_per_shard
        if given and (given >= 1 or int(1 / given + 1e-9) * held <= self._usable):
            return given
        if given:
            raise DoesNotFit(
                f"experts.gpus_per_shard: {int(1 / given + 1e-9)} shards with {gib(held)} each do not fit "
                f"{self.hardware.gpu.name}, which has {gib(self._usable)}"
            )
        number = len(self._groups())
        cards = math.ceil(number / min(MOST_ON_A_CARD, int(self._usable // held)))
        return 1 / math.ceil(number / cards)

    def _on_cpus(self, groups: Sequence[tuple[int, ...]], model: Model, objective: Objective) -> set[int]:
        """As many of those that are asked for least as leave a step of a few sequences within the objective."""
        chances = self.popularity.chances().sum(axis=0)
        by_use = sorted(range(len(groups)), key=lambda index: (chances[list(groups[index])].sum(), index))
        work = Work(TYPICAL_SEQUENCES, 1024)
        for number in range(len(groups) - 1, 0, -1):
            cold = set(by_use[:number])
            costs = self._split_costs(
                model, [Group(one, model.one_expert_bytes, at not in cold) for at, one in enumerate(groups)]
            )
            stations = Stations(tuple((len(groups) if at in cold else at,) for at in range(len(groups))))
            own_s = costs.own_s(work)
            found = costs.experts(work.rows, 1, stations, self.popularity.chances(), 0, own_s)
            if costs.step_s(work, found.step_s) <= objective.token_s:
                return cold
        return set()

    def _of_tiers(self, plain: Sequence[tuple[int, ...]], model: Model) -> tuple[list[Group], list[ShardDeployment]]:
        """As configured; named as Serve's deployments are."""
        experts = self.config.experts
        groups: list[Group] = []
        shards: list[ShardDeployment] = []
        for index, of_group in enumerate(plain):
            tiers = experts.tiers_of(index)
            names = [f"expert-{index}" if not at else f"expert-{index}-tier{at}" for at in range(len(tiers))]
            scalings = [experts.scaling_of(index, tier) for tier in tiers.values()]
            beside = tuple(names) if len(tiers) > 1 and any(not one.min_replicas for one in scalings) else ()
            for name, tier, scaling in zip(names, tiers.values(), scalings, strict=True):
                held, bits = self._held(tier, model)
                on_gpu = tier.device == "cuda"
                shards.append(
                    ShardDeployment(
                        name,
                        len(groups),
                        scaling,
                        self._start_s(len(of_group) * held),
                        tier.gpus if on_gpu else 0.0,
                        beside,
                    )
                )
                groups.append(Group(of_group, held, on_gpu, bits))
        return groups, shards

    def _held(self, tier: TierConfig, model: Model) -> tuple[int, int]:
        """Bytes of an expert, and bits of a number of it."""
        rounding = self.config.rounding_of(tier)
        if rounding is None and self.config.engine.rounding is None:
            return model.one_expert_bytes, 16
        rounded = self.checkpoint.rounded(rounding)
        name = next(iter(expert_tensors(model.architecture, 0, 0)))
        bits = held_bits(rounded.tensors[name], model.dtype, tier.device)
        return held_weights(rounded, model.dtype, tier.device).expert, bits

    def _fewest(self, model: Model) -> int:
        """GPUs, a power of two, that hold everything and one sequence."""
        if not self._gpus:
            return 1
        one = self.max_model_len * self._kv_bytes(model)
        return int(2 ** math.ceil(math.log2(max(1.0, (model.all_bytes + one) / self._usable)) - 1e-9))

    def _kv_bytes(self, model: Model) -> int:
        kept_in = kv_dtype(self.config.engine.kv_cache_dtype, model.dtype, self._device)
        return kv_bytes_per_token(model.architecture, kept_in)

    def _kv_tokens(self, model: Model, usable: float, held: float, what: str) -> int:
        engine = self.config.engine
        if engine.num_kv_blocks is not None:
            return engine.num_kv_blocks * engine.block_size
        free = engine.kv_cache_gib * 2**30 if engine.kv_cache_gib is not None else usable - held
        tokens = int(free // self._kv_bytes(model))
        if tokens < engine.block_size or free > usable - held:
            raise DoesNotFit(
                f"a coordinator needs {gib(held)} for weights and {gib(max(free, 0))} for its cache, and "
                f"{what}{self.hardware.gpu.name} has {gib(usable)} to use"
            )
        return tokens

    def _start_s(self, held: float) -> float:
        return self.options.process_s + held / self.options.load_bandwidth

    def _bounds(self, scaling: CoordinatorScalingConfig) -> CoordinatorScalingConfig:
        if self.options.fixed or scaling.max_replicas > scaling.min_replicas:
            return scaling
        return scaling.model_copy(update={"min_replicas": 1, "max_replicas": self.options.max_replicas})

    def _scaling(self, scaling: ScalingConfig) -> ScalingConfig:
        if self.options.fixed or scaling.max_replicas > scaling.min_replicas:
            return scaling
        return scaling.model_copy(update={"min_replicas": 1, "max_replicas": self.options.max_replicas})


def tuned(fleet: Fleet, objective: Objective, arrivals: Sequence[Arrival]) -> Fleet:
    """With as many sequences in a batch as leave its steps within the objective: the policies know of no objective.

    Of the steps of a full batch some have a chunk beside their tokens: as many as these arrivals bring prompts for.
    Where not even one sequence is within it, the configuration's number stays.
    """
    if not arrivals:
        return fleet
    prompt = sum(one.prompt_tokens for one in arrivals) / len(arrivals)
    output = sum(one.output_tokens for one in arrivals) / len(arrivals)
    chunk = max(fleet.engine.max_num_batched_tokens / 4, LEAST_PROMPT_TOKENS)
    number = LARGEST_BATCH
    while number:
        context = prompt + output / 2
        with_chunk = number * prompt / output / chunk  # of the steps
        token_s = max(0.0, 1 - with_chunk) * _alone_s(fleet, Work(number, context))
        token_s += with_chunk * _alone_s(fleet, Work(number, context, chunk, prompt / 2))
        if token_s <= TUNED * objective.token_s:
            return replace(fleet, engine=fleet.engine.model_copy(update={"max_num_seqs": number}))
        number //= 2
    return fleet


def _alone_s(fleet: Fleet, work: Work) -> float:
    """A step where there is one coordinator, and one replica of each group."""
    chances = fleet.popularity.chances()
    if isinstance(fleet.costs, WholeCosts):
        return fleet.costs.step_s(work, chances)
    stations = placed(fleet.shards, [1] * len(fleet.shards))
    found = fleet.costs.experts(work.rows, 1, stations, chances, 0, fleet.costs.own_s(work))
    return fleet.costs.step_s(work, found.step_s)
