"""What tests of attention share: sequences in a cache, with NaN wherever nothing was written."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import torch

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from router_service.attention.backend import AttentionBackend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span

LAYER = 1
CPU = torch.device("cpu")


def sized(*, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None = None) -> Architecture:
    """Mixtral, but with these heads."""
    return replace(
        MIXTRAL_8X7B, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=sliding_window
    )


@dataclass
class Tokens:
    """One sequence: what it asks with, and what it is asked, at each of its positions."""

    queries: torch.Tensor  # [S, N, H]
    keys: torch.Tensor  # [S, G, H]
    values: torch.Tensor  # [S, G, H]

    @classmethod
    def random(cls, architecture: Architecture, length: int, dtype: torch.dtype, device: torch.device = CPU) -> Tokens:
        heads = (architecture.num_heads, architecture.num_kv_heads, architecture.num_kv_heads)
        return cls(*(torch.randn(length, number, architecture.head_dim).to(device, dtype) for number in heads))

    def rounded(self) -> Tokens:
        """With keys and values as 8 bits have them: 127 is the largest of a token's in a head."""

        def of(x: torch.Tensor) -> torch.Tensor:
            largest = x.float().abs().amax(-1, keepdim=True)
            inverse = torch.full_like(largest, 127) / largest
            codes = (x.double() * inverse.double()).round().float()
            return torch.where(largest > 0, codes * (largest / 127), 0.0)

        return Tokens(self.queries, of(self.keys), of(self.values))

    def expected(self, window: int | None, first: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of every position from `first` on in float64, by the formula; `sinks` [N] have no value."""
        length, num_heads, head_dim = self.queries.shape
        times = num_heads // self.keys.shape[1]
        keys, values = (x.double().repeat_interleave(times, dim=1) for x in (self.keys, self.values))
        scores = torch.einsum("qnh,knh->nqk", self.queries[first:].double(), keys) / head_dim**0.5
        positions = torch.arange(length, device=keys.device)
        seen = positions[None] <= positions[first:, None]
        if window:
            seen &= positions[None] > positions[first:, None] - window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(self.keys)]
        return torch.einsum("nqk,knh->qnh", weights, values)


def nan(memory: torch.Tensor) -> float:
    """What makes every number of a cache NaN: of codes all bits of the scales are set."""
    return {torch.uint8: 255, torch.int8: -1}.get(memory.dtype, float("nan"))


class Pages:
    """A cache in which everything is NaN but the null page, and sequences with blocks in any order."""

    def __init__(
        self,
        backend: AttentionBackend,
        block_size: int,
        num_blocks: int,
        dtype: torch.dtype,
        order: torch.Tensor,
        device: torch.device = CPU,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """`order`: the numbers of the blocks as they are handed out. `sinks` [N], for backends that know of them."""
        self.backend, self.block_size, self.sinks = backend, block_size, sinks
        self.cache = KVCache(2, num_blocks, backend.layout, dtype=dtype, device=device)
        for memory in (self.cache.keys, self.cache.values):
            memory[:, 1:] = nan(memory)
        self._free = iter(order.tolist())
        self._tables: list[array[int]] = []

    def new_sequence(self) -> int:
        self._tables.append(array("i"))
        return len(self._tables) - 1

    def step(self, parts: list[tuple[int, Tokens, int, int]]) -> list[torch.Tensor]:
        """Positions start … end - 1 of some sequences, as (sequence, tokens, start, end), in one step."""
        spans = []
        for number, _, start, end in parts:
            table = self._tables[number]
            while len(table) * self.block_size < end:
                table.append(next(self._free))
            spans.append(Span(start, end - start, table))
        plan = self.backend.plan(AttentionMetadata(spans, self.block_size))
        queries, keys, values = (
            torch.cat([getattr(tokens, name)[start:end] for _, tokens, start, end in parts])
            for name in ("queries", "keys", "values")
        )
        if self.sinks is None:
            attended = plan.attend(LAYER, queries, keys, values, self.cache)
        else:
            plan.write(LAYER, keys, values, self.cache)
            attended = plan.read(LAYER, queries, self.cache, self.sinks)  # type: ignore[call-arg]
        return list(attended.split([end - start for *_, start, end in parts]))

    def release(self, number: int, position: int) -> None:
        """Give away the blocks before a position, to somebody whose values are NaN."""
        for index in range(position // self.block_size):
            block = self._tables[number][index]
            self._tables[number][index] = 0
            if block:
                for memory in (self.cache.keys, self.cache.values):
                    memory[:, block] = nan(memory)
