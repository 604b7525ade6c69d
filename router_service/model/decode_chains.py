"""The layers of a step of few rows as calls that are put together once for a number of rows.

    project          norm of x + what the layer before says → q, k, v → rotated
    choose_experts   attention → o → norm of x + that → the gate's choice, and which rows go where, if experts do not
    feed_forward     the same up to the choice, then rows by expert → experts → combined, where experts are here
    run              all layers at once

Attention is in them where the backend has tasks: then `project` is a part of the others. Else it is called between
`project` and them, and there is no `run`. In bf16 on a CPU, with the bits of the same calls one by one. The buffers
stay where they are, so nothing is made anew in a step. Knows nothing of dispatchers.

Shapes: T tokens, D hidden size, N query heads, G key-value heads, H head_dim, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cluster.checkpoint.architecture import Architecture, Multipliers
from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.route import Route, RouteElsewhere
from experts_service.kernels.compiled.routine import Task
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import Chained, SwiGLU
from router_service.attention.backend import AttentionPlan, ChainedAttention
from router_service.attention.kv_cache import KVCache
from router_service.model.gate import Gate
from router_service.rows import Choice, Combining, combine_task, is_compiled, norm_task, rotate_task

MOST_ROWS = 64  # of more the calls are not what takes the time
KEPT = 8  # of them, for the numbers of rows of the last steps

_ExpertTasks = Callable[[int, Choice], list[Task]]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one."""

    input_norm: torch.Tensor  # [D]
    qkv: Linear  # D → (N + 2G)·H
    o: Linear  # N·H → D
    qkv_bias: torch.Tensor | None  # [(N + 2G)·H]
    qk_norms: Sequence[torch.Tensor] | None  # of queries and of keys: [H] each, or [N·H] and [G·H]
    clip_qkv: float | None
    post_attention_norm: torch.Tensor  # [D]
    gate: Gate | None  # who computes its feed-forward,
    dense: SwiGLU | None  # or what does; of both the sum
    dense_gate: torch.Tensor | None  # [1, D] of what it says, fp32

    @property
    def is_plain(self) -> bool:
        """Whether queries, keys and values are what `qkv` says."""
        return self.qkv_bias is None and self.qk_norms is None and self.clip_qkv is None

    @property
    def linears(self) -> list[Linear]:
        """Without those of the feed-forward network."""
        return [self.qkv, self.o, *([] if self.gate is None else [self.gate.scores])]


def are_served(layers: Sequence[Layer], architecture: Architecture, embeddings: torch.Tensor) -> bool:
    """Whether a model's rows can be done like this: its layers are Mixtral's, or Mistral's."""
    if architecture.multipliers != Multipliers():
        return False
    if not all(layer.is_plain and (layer.gate is None or layer.gate.is_chained) for layer in layers):
        return False
    if not (all(layer.dense is None for layer in layers) or all(layer.gate is None for layer in layers)):
        return False
    widths = (architecture.hidden_size, architecture.head_dim // 2)
    linears = (linear for layer in layers for linear in layer.linears)
    return all(is_compiled(embeddings, width) for width in widths) and all(linear.has_tasks for linear in linears)


class DecodeChains:
    """For `num_rows` rows, one step at a time: who uses them has them to itself."""

    def __init__(
        self,
        layers: Sequence[Layer],
        architecture: Architecture,
        num_rows: int,
        attention: AttentionPlan | None,
        kv_cache: KVCache,
        experts: Sequence[Chained] | None = None,
        route: RouteElsewhere | None = None,
    ) -> None:
        """`attention`: of a step with so many rows; None: it is to be called.

        `experts`: those of each layer, where they are in this process. `route`: what sorts rows for those elsewhere.
        """
        self.num_rows, self.kv_cache, self.route = num_rows, kv_cache, route
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        query_heads, kv_heads = architecture.num_heads, architecture.num_kv_heads
        qkv = self._rows(query_heads + 2 * kv_heads, head_dim)
        self.x = self._rows(hidden)  # the residual stream
        self.delta = self._rows(hidden)  # what is to be added to it: of the feed-forward before, then of attention
        self.rows = self._rows(hidden)  # for the feed-forward
        self.queries, self.keys, self.values = qkv.split([query_heads, kv_heads, kv_heads], dim=1)  # [T, N or G, H]
        self.attended = self._rows(query_heads * head_dim)
        self.cosines, self.sines = self._rows(head_dim), self._rows(head_dim)
        self.choices: list[Choice] = []  # of each layer, as they are until it chooses again
        self.counts = torch.zeros(len(layers), architecture.num_experts, dtype=torch.int64)  # rows of experts here
        self._qkv, self._rotated = qkv.flatten(1), qkv[:, : query_heads + kv_heads]
        self._epsilon = architecture.rms_norm_eps
        self._integers = torch.empty(
            num_rows * max(linear.integers for layer in layers for linear in layer.linears), dtype=torch.int32
        )
        self._before = [self._up_to_attention(layer, has_delta=index > 0) for index, layer in enumerate(layers)]
        self._attention: ChainedAttention | None = None
        if attention is not None:
            self._attention = attention.chained(self.queries, self.keys, self.values, self.attended, kv_cache)
        self._threads = 1  # that attention is worth
        self._after = [self._up_to_choice(index, layer) for index, layer in enumerate(layers)]
        self._experts: list[list[Task]] = []
        if experts is not None:
            of_layer = self._expert_tasks(experts, architecture)
            self._experts = [of_layer(index, choice) for index, choice in enumerate(self.choices)]

    @property
    def has_attention(self) -> bool:
        """Whether it is in the calls."""
        return self._attention is not None

    @property
    def has_experts(self) -> bool:
        """Whether they are in the calls: of `feed_forward`, or of `run` with attention."""
        return bool(self._experts)

    def set_attention(self, plan: AttentionPlan) -> None:
        """That of the step."""
        if self._attention is not None:
            self._threads = self._attention.set_plan(plan)

    def run(self) -> None:
        """From `x` of all layers to `x` and `delta` of the last."""
        self._run(self._all)

    def project(self, layer: int) -> None:
        """From `x`, and `delta` of the layer before, to `queries`, `keys` and `values`. Where attention is called."""
        self._project[layer].run()

    def choose_experts(self, layer: int) -> None:
        """From what `project` takes, or from `attended`, to `rows`, and to the gate's choice."""
        self._run(self._choose[layer])

    def feed_forward(self, layer: int) -> None:
        """From the same to `delta`."""
        self._run(self._feed_forward[layer])

    def _run(self, chain: Chain) -> None:
        """To its end. It halts at a choice that is in doubt."""
        halted = chain.run(self._threads)
        while halted:
            for choice in self.choices:
                choice.settle()
            halted = chain.go_on(self._threads)

    # Those that a step uses are put together when it does first.

    @cached_property
    def combining(self) -> list[Combining]:
        """What adds up each layer's answers, of experts elsewhere, in `delta`."""
        return [Combining(choice.weights, self.delta) for choice in self.choices]

    @cached_property
    def _project(self) -> list[Chain]:
        return [Chain(tasks) for tasks in self._before]

    @cached_property
    def _choose(self) -> list[Chain]:
        route = self.route
        if route is None:
            return [Chain(tasks) for tasks in self._leading()]
        of_layers = zip(self._leading(), self.choices, strict=True)
        return [Chain([*tasks, route.task(self.rows, choice.experts)]) for tasks, choice in of_layers]

    @cached_property
    def _feed_forward(self) -> list[Chain]:
        return [Chain([*first, *then]) for first, then in zip(self._leading(), self._experts, strict=True)]

    @cached_property
    def _all(self) -> Chain:
        assert self.has_attention
        of_layers = zip(self._leading(), self._experts, strict=True)
        return Chain([task for first, then in of_layers for task in (*first, *then)])

    def _leading(self) -> list[list[Task]]:
        """Of each layer, up to the gate's choice from where attention was called, if it is."""
        if not self.has_attention:
            return self._after
        return [[*before, *after] for before, after in zip(self._before, self._after, strict=True)]

    def _rows(self, *shape: int) -> torch.Tensor:
        return torch.empty((self.num_rows, *shape), dtype=torch.bfloat16)

    def _up_to_attention(self, layer: Layer, *, has_delta: bool) -> list[Task]:
        return [
            norm_task(self.x, layer.input_norm, self._epsilon, self.delta if has_delta else None, self.rows),
            *layer.qkv.tasks(self.rows, self._qkv, self._integers),
            rotate_task(self._rotated, self.cosines, self.sines),
        ]

    def _up_to_choice(self, index: int, layer: Layer) -> list[Task]:
        tasks = [
            *(() if self._attention is None else self._attention.tasks(index)),
            *layer.o.tasks(self.attended, self.delta, self._integers),
            norm_task(self.x, layer.post_attention_norm, self._epsilon, self.delta, self.rows),
        ]
        if (gate := layer.gate) is not None:
            scores = self._rows(gate.scores.out_features)
            choice = Choice(scores, gate.top_k)
            self.choices.append(choice)
            tasks += (*gate.scores.tasks(self.rows, scores, self._integers), choice.task)
        return tasks

    def _expert_tasks(self, experts: Sequence[Chained], architecture: Architecture) -> _ExpertTasks:
        """What makes those of a layer. All layers use the same buffers."""
        top_k, num_experts, hidden = architecture.top_k, architecture.num_experts, architecture.hidden_size
        route = Route(self.num_rows, top_k, num_experts, hidden)
        pairs = top_k * self.num_rows
        jobs = [torch.empty(route.num_jobs, table.shape[1], dtype=torch.int64) for table in experts[0].tables]
        of_hidden = torch.empty(pairs, experts[0].intermediate, dtype=torch.bfloat16)
        integers = torch.empty(pairs * max(of_layer.integers for of_layer in experts), dtype=torch.int32)
        answers = torch.empty(pairs, hidden, dtype=torch.bfloat16)
        self._keeps = (route, of_hidden, answers)

        def of_layer(layer: int, choice: Choice) -> list[Task]:
            chained = experts[layer]
            return [
                route.task(self.rows, choice.experts, self.counts[layer], chained.tables, jobs),
                *chained.make_tasks(jobs, route.sorted, of_hidden, integers, answers),
                combine_task(answers, choice.weights, route.places, route.pairs, self.delta),
            ]

        return of_layer
