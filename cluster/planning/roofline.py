"""How long a decode step has to take at least, by bytes read and operations done. Plain arithmetic; no torch, no Ray.

The roofline of Williams, Waterman and Patterson (CACM 52(4), 2009): a part of a step takes the longer of the time to
read its bytes and the time to do its operations. One step makes one token for each of `sequences`, with

    E experts, k of them per token, G groups, C coordinators, L layers, context tokens in every sequence

    experts that one of n rows asks for     E · (1 - (1 - k/E)^n), when all are asked for alike
    shard, per step                         reads those of its group, once; 2 operations per parameter and row
    coordinator, per step                   reads its weights once, and the cache of its sequences/C
    wire, per layer and direction           sequences · (groups that a row goes to) rows of the hidden size

Splitting attention from experts pays because rows of all coordinators meet at one expert, which is then read once for
many (MegaScale-Infer, arXiv 2504.02263, has the same balance of the two halves in its section 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, comb, prod

from cluster.checkpoint.architecture import Architecture, coordinator_tensors
from cluster.planning.gpus import GpuType
from cluster.planning.placement import DTYPE_BYTES, Dtype, WeightBytes, kv_bytes_per_token

CHUNK = 2048  # tokens of a prompt in one step: the default of engine.max_num_batched_tokens


@dataclass(frozen=True)
class Model:
    """What a step reads and computes. A plan asks thousands of times for what is counted over all layers."""

    architecture: Architecture
    dtype: Dtype
    weights: WeightBytes  # as the device holds them

    @classmethod
    def plain(cls, architecture: Architecture, dtype: Dtype) -> Model:
        """One that is not quantised."""
        return cls(architecture, dtype, WeightBytes.of(architecture, dtype))

    @property
    def is_plain(self) -> bool:
        """Whether nothing is rounded."""
        return self.weights == WeightBytes.of(self.architecture, self.dtype)

    @property
    def attention_bytes(self) -> int:
        """Weights that a coordinator reads in a step; of the embeddings it reads a row per token."""
        a = self.architecture
        table = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size * DTYPE_BYTES[self.dtype]
        return self.coordinator_bytes - table

    @cached_property
    def attention_parameters(self) -> int:
        """That a coordinator multiplies each row with."""
        a = self.architecture
        table = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
        return sum(prod(shape) for shape in coordinator_tensors(a).values()) - table

    @cached_property
    def one_expert_parameters(self) -> int:
        """In all layers."""
        a = self.architecture
        return a.num_expert_layers * 3 * a.hidden_size * a.intermediate_size

    @property
    def coordinator_bytes(self) -> int:
        """What a coordinator holds, without its cache."""
        return self.weights.coordinator

    @property
    def all_bytes(self) -> int:
        """Of all weights."""
        return self.coordinator_bytes + self.architecture.num_experts * self.one_expert_bytes

    @property
    def one_expert_bytes(self) -> int:
        """In all layers; 0 of a dense model."""
        return self.weights.expert

    def touched(self, rows: float, experts: int) -> float:
        """How many of so many experts are asked for by at least one of the rows, in each layer."""
        a = self.architecture
        if not experts:
            return 0.0
        untouched: float = (1 - a.top_k / a.num_experts) ** rows
        return experts * (1 - untouched)

    def groups_asked(self, rows: float, groups: Sequence[int]) -> float:
        """How many of the groups, with so many experts each, at least one of the rows is sent to."""
        a = self.architecture
        choices = comb(a.num_experts, a.top_k)
        asked = 0.0
        for size, number in Counter(groups).items():
            none_goes_there: float = (comb(a.num_experts - size, a.top_k) / choices) ** rows
            asked += number * (1 - none_goes_there)
        return asked


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for in one step."""

    sequences: float
    context: int  # tokens of each, in the cache


@dataclass(frozen=True, slots=True)
class Link:
    """Between coordinators and shards."""

    bandwidth: float  # bytes a second, in each direction, of one process
    dispatch_s: float  # for one layer, there and back, whatever the rows
    group_s: float = 0.0  # the same, for each group that is asked


def cache_bytes(model: Model, load: Load, coordinators: int = 1) -> int:
    """Of one of them. Its sequences are whole ones, and keep what is in the window while a chunk is computed; and one
    sequence has a place for all of its tokens, as an engine wants it.
    """
    a = model.architecture
    kept = min(load.context, (a.sliding_window or load.context) + CHUNK)
    tokens = max(load.context, ceil(load.sequences / coordinators) * kept)
    return tokens * kv_bytes_per_token(a, model.dtype)


def attention_s(model: Model, gpu: GpuType, load: Load, gpus: float = 1.0) -> float:
    """A coordinator's part of a step for `load`, its own sequences."""
    a = model.architecture
    seen = min(load.context, a.sliding_window or load.context)  # tokens
    cache = load.sequences * seen * kv_bytes_per_token(a, model.dtype)
    scores = 4 * a.num_layers * a.num_heads * a.head_dim * seen  # q·k and p·v, of one token
    operations = load.sequences * (2 * model.attention_parameters + scores)
    return max((model.attention_bytes + cache) / gpu.bandwidth, operations / gpu.flops) / gpus


def experts_s(model: Model, gpu: GpuType, rows: float, experts: int, gpus: float = 1.0) -> float:
    """The part of a process with so many experts, when `rows` are decoded by all coordinators together.

    Of a batch that asks for fewer than one of them, on average, the step still waits for one where it asks for it.
    """
    a = model.architecture
    if not experts:
        return 0.0
    touched = max(model.touched(rows, experts), 1.0)
    here = rows * a.top_k * experts / a.num_experts
    operations = 2 * here * model.one_expert_parameters
    return max(touched * model.one_expert_bytes / gpu.bandwidth, operations / gpu.flops) / gpus


def wire_s(model: Model, link: Link, rows: float, groups: Sequence[int]) -> float:
    """Rows of one coordinator to the shards and back, all layers."""
    if not groups:
        return 0.0
    a = model.architecture
    one_way = rows * model.groups_asked(1, groups) * a.hidden_size * DTYPE_BYTES[model.dtype] / link.bandwidth
    return a.num_expert_layers * (2 * one_way + link.dispatch_s + link.group_s * model.groups_asked(rows, groups))


def disaggregated_s(
    model: Model,
    gpu: GpuType,
    link: Link,
    load: Load,
    groups: Sequence[int],
    coordinators: int,
    *,
    shared: bool = False,
    host_s: float = 0.0,
) -> float:
    """A step, whole or in two halves that take turns, whichever is sooner.

    Every process has a GPU of its own, or, `shared`, each coordinator is on one of the shards': nothing can overlap.
    `host_s`: Python and launches of the coordinator, in all layers, for the whole or for each half.
    """

    def parts(load: Load) -> tuple[float, float]:
        own = Load(load.sequences / coordinators, load.context)
        there = max((experts_s(model, gpu, load.sequences, size) for size in set(groups)), default=0.0)
        return host_s + attention_s(model, gpu, own), there + wire_s(model, link, own.sequences, groups)

    whole = sum(parts(load))
    if shared or load.sequences < 2 * coordinators:
        return whole
    near, far = parts(Load(load.sequences / 2, load.context))
    return min(whole, max(2 * near, 2 * far, near + far))


def local_s(model: Model, gpu: GpuType, load: Load, host_s: float = 0.0, gpus: int = 1) -> float:
    """A step of one process that holds everything, on a GPU, or on several that split it evenly.

    `host_s`: Python and launches. Nothing there waits for the device, so they are done while it computes.
    """
    experts = experts_s(model, gpu, load.sequences, model.architecture.num_experts, gpus)
    return max(host_s, attention_s(model, gpu, load, gpus) + experts)


def prefill_s(
    model: Model, gpu: GpuType, link: Link | None, tokens: int, groups: Sequence[int], host_s: float = 0.0
) -> float:
    """A prompt of so many tokens that nothing else delays, in chunks. Without `link` the experts are local."""
    seconds = 0.0
    for start in range(0, tokens, CHUNK):
        rows = min(CHUNK, tokens - start)
        computed = chunk_attention_s(model, gpu, start, rows)
        computed += max((experts_s(model, gpu, rows, size) for size in set(groups)), default=0.0)
        seconds += max(host_s, computed) if link is None else host_s + computed + wire_s(model, link, rows, groups)
    return seconds


def chunk_attention_s(model: Model, gpu: GpuType, start: int, rows: int) -> float:
    """A coordinator's part of so many tokens of a prompt, those after its first `start`."""
    a = model.architecture
    window = a.sliding_window or start + rows
    read = model.attention_bytes + (min(start, window) + rows) * kv_bytes_per_token(a, model.dtype)
    scores = 4 * a.num_layers * a.num_heads * a.head_dim * min(start + rows / 2, window)  # of a token in the middle
    return max(read / gpu.bandwidth, rows * (2 * model.attention_parameters + scores) / gpu.flops)
