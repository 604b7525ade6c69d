"""What a layer does beside attention and experts as two calls, put together once for a number of rows.

    before: norm of x + what came last → q, k, v → rotated
    after:  o → norm of x + that → the gate's choice

For few rows, in bf16 on a CPU, with the bits of the same calls one by one. The buffers stay where they are, so nothing
is made anew in a step. Knows neither cache nor experts.

Shapes: T tokens, D hidden size, N query heads, G key-value heads, H head_dim, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.checkpoint.architecture import Architecture
from experts_service.kernels.chain import Chain
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import SwiGLU
from router_service.model.gate import Gate
from router_service.rows import Choice, Pair, is_compiled, norm_task, rotate_task

MOST_ROWS = 64  # of more the calls are not what takes the time
KEPT = 8  # of them, for the numbers of rows of the last steps


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one."""

    input_norm: torch.Tensor  # [D]
    qkv: Linear  # D → (N + 2G)·H
    o: Linear  # N·H → D
    post_attention_norm: torch.Tensor  # [D]
    feed_forward: Gate | SwiGLU  # who computes it, or what

    @property
    def linears(self) -> list[Linear]:
        """Without those of the feed-forward network."""
        gate = [self.feed_forward.scores] if isinstance(self.feed_forward, Gate) else []
        return [self.qkv, self.o, *gate]


def are_served(layers: Sequence[Layer], architecture: Architecture, embeddings: torch.Tensor) -> bool:
    """Whether a model's rows can be done like this."""
    widths = (architecture.hidden_size, architecture.head_dim // 2)
    linears = (linear for layer in layers for linear in layer.linears)
    return all(is_compiled(embeddings, width) for width in widths) and all(linear.has_tasks for linear in linears)


class DecodeChains:
    """For `num_rows` rows, one step at a time: who uses them has them to itself."""

    def __init__(self, layers: Sequence[Layer], architecture: Architecture, num_rows: int) -> None:
        def rows(*shape: int) -> torch.Tensor:
            return torch.empty((num_rows, *shape), dtype=torch.bfloat16)

        self.num_rows = num_rows
        hidden, head_dim, epsilon = architecture.hidden_size, architecture.head_dim, architecture.rms_norm_eps
        query_heads, kv_heads = architecture.num_heads, architecture.num_kv_heads
        qkv = rows(query_heads + 2 * kv_heads, head_dim)
        self.x = rows(hidden)  # the residual stream
        self.delta = rows(hidden)  # what is to be added to it: of the feed-forward before, then of attention
        self.rows = rows(hidden)  # for the feed-forward
        self.queries, self.keys, self.values = qkv.split([query_heads, kv_heads, kv_heads], dim=1)  # [T, N or G, H]
        self.attended = rows(query_heads * head_dim)
        self.cosines, self.sines = rows(head_dim), rows(head_dim)
        integers = torch.empty(
            num_rows * max(linear.integers for layer in layers for linear in layer.linears), dtype=torch.int32
        )
        self._before: list[Chain] = []
        self._after: list[Chain] = []
        self._choices: list[Choice] = []
        rotated = qkv[:, : query_heads + kv_heads]
        for index, layer in enumerate(layers):
            delta = self.delta if index else None
            before = [
                norm_task(self.x, layer.input_norm, epsilon, delta, self.rows),
                *layer.qkv.tasks(self.rows, qkv.flatten(1), integers),
                rotate_task(rotated, self.cosines, self.sines),
            ]
            after = [
                *layer.o.tasks(self.attended, self.delta, integers),
                norm_task(self.x, layer.post_attention_norm, epsilon, self.delta, self.rows),
            ]
            if isinstance(layer.feed_forward, Gate):
                gate = layer.feed_forward
                scores = rows(gate.scores.out_features)
                choice = Choice(scores, gate.top_k)
                after += (*gate.scores.tasks(self.rows, scores, integers), choice.task)
                self._choices.append(choice)
            self._before.append(Chain(before))
            self._after.append(Chain(after))

    def before_attention(self, layer: int) -> None:
        """From `x`, and from the second layer on `delta`: to `queries`, `keys` and `values`."""
        self._before[layer].run()

    def after_attention(self, layer: int) -> None:
        """From `attended` to `rows`."""
        self._after[layer].run()

    def chosen(self, layer: int) -> Pair:
        """What its gate chose after that: weights and experts [T, K], as they are until it chooses again."""
        return self._choices[layer].chosen()
