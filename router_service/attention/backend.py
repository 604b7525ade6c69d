"""What a way to attend has to offer: the seam between decoder, cache and kernels. Knows none of them.

A backend says how a page of the cache is laid out, and makes a plan of each step that every layer uses. Whatever it
is, a token sees itself and what comes before it in its own sequence, no further back than the sliding window; slots
that were not written, and blocks of others, may hold anything, NaN included, and reach nobody.

Shapes: T tokens of the step, N query heads, G key-value heads, H head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from experts_service.kernels.compiled.routine import Task
from router_service.attention.kv_cache import KVCache, PageLayout
from router_service.attention.metadata import AttentionMetadata


class AttentionPlan(ABC):
    """How the tokens of one step attend."""

    @abstractmethod
    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache) -> None:
        """Store the step's keys and values [T, G, H]."""

    @abstractmethod
    def read(self, layer: int, queries: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Attention of `queries` [T, N, H] over what the cache holds of their own sequences. Returns [T, N, H]."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_cache: KVCache
    ) -> torch.Tensor:
        """Write the new keys and values, then read what each token sees. Returns [T, N, H]."""
        self.write(layer, keys, values, kv_cache)
        return self.read(layer, queries, kv_cache)

    def chained(
        self,
        queries: torch.Tensor,  # noqa: ARG002
        keys: torch.Tensor,  # noqa: ARG002
        values: torch.Tensor,  # noqa: ARG002
        output: torch.Tensor,  # noqa: ARG002
        kv_cache: KVCache,  # noqa: ARG002
    ) -> ChainedAttention | None:
        """`attend` as tasks, of this and of later plans with as many tokens; None: there are none.

        The tensors stay where they are. `output` [T, N · H] has no gaps.
        """
        return None


class ChainedAttention(ABC):
    """Attention as tasks that stay the same from step to step, while what they do is the plan's that was set last."""

    @abstractmethod
    def tasks(self, layer: int) -> list[Task]:
        """That write the new keys and values of a layer, and read what each token sees."""

    @abstractmethod
    def set_plan(self, plan: AttentionPlan) -> int:
        """From now on it is that of this plan. Returns how many threads are worth it."""


class StaticPlan(AttentionPlan):
    """A plan of steps in which every sequence decodes: one object for many steps, so that they can be captured.

    It starts the same kernels in as many programs whatever step it is of, on memory that stays where it is. Use:
    `update` with a first step, capture `attend` in all layers in a CUDA graph; from then on `update`, and replay.
    """

    @abstractmethod
    def update(self, metadata: AttentionMetadata) -> None:
        """Make it the plan of this step: one copy to the device, on the current stream, not waited for.

        The step has one new token of each sequence, of no more sequences than the plan is for, and they are the first
        of its rows. Rows behind them see the null page, write nothing, and get zeros.
        """


class AttentionBackend(ABC):
    """One way to attend."""

    name: str  # as the log, benchmarks, metrics and `system_fingerprint` have it
    layout: PageLayout
    gathers: bool  # copies what it reads

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """For the layers of one step."""

    def decode_plan(self, num_sequences: int, max_model_len: int) -> StaticPlan | None:  # noqa: ARG002
        """For steps in which at most so many sequences decode, none longer than that; None: it cannot be captured."""
        return None
