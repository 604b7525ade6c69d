"""Decode steps as CUDA graphs: all their launches are one. Knows batch sizes, buffers and replay; knows no sequence.

A graph does the same on the same memory whenever it is replayed. So a batch is padded to the next size for which there
is a graph, and what a step is told is copied to where the graph reads it:

    ids, positions, attention's plan ──▶ copied ──▶ replay ──▶ logits, where the graph leaves them

Rows of padding see the null page, write nothing, and nobody reads what they make. They go to no expert that is here:
its weights would be read for nothing. How many rows are real is a number on the device.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.planning.step_memory import graph_sizes
from router_service.attention.backend import AttentionBackend, AttentionPlan, StaticPlan
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata
from router_service.model.decoder import Decoder

logger = logging.getLogger(__name__)

# Rows of a step: its ids [B], their positions [B], how many are real [1], and how they attend, to logits [B, V]; as
# launches, without a wait.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]


class Graph(Protocol):
    """One recorded run."""

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Record it. Returns where every replay leaves its result."""

    def replay(self) -> None:
        """Once more, on what lies in the same memory now."""


class CudaGraph:
    """CUDA's own. Those of one pool share memory, as only one of them is in use at a time."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs it once before, on a stream of its own: libraries allocate and kernels are compiled at their first."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may ask the driver for memory meanwhile, which would end a capture that concerns all.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graph of one batch size, and the memory that it works on."""

    graph: Graph
    token_ids: torch.Tensor  # [B]
    positions: torch.Tensor  # [B]
    num_real: torch.Tensor  # [1]
    plan: StaticPlan
    logits: torch.Tensor  # [B, V]


class DecodeGraphs:
    """A graph for each batch size, captured when it is first needed."""

    def __init__(
        self,
        run: Run,
        new_plan: Callable[[int], StaticPlan],
        new_graph: Callable[[], Graph],
        *,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        """`new_plan`: for at most so many sequences that decode."""
        self._run, self._new_plan, self._new_graph = run, new_plan, new_graph
        self._sizes = graph_sizes(max_num_seqs)
        self._device = device
        self._captured: dict[int, _Captured] = {}
        self._has_failed = False

    def __call__(
        self,
        token_ids: torch.Tensor,  # [B]
        positions: torch.Tensor,  # [B]
        metadata: AttentionMetadata,
    ) -> torch.Tensor | None:
        """Logits [B, V] of a step in which each sequence gets one token, good until the next. None: run it eagerly.

        Raises what replaying raises; that graph is not used again.
        """
        num_rows = len(token_ids)
        if self._has_failed or num_rows > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        captured = self._captured.pop(size, None) or self._capture(size, metadata)
        if captured is None:
            return None
        captured.token_ids[:num_rows].copy_(token_ids)
        captured.positions[:num_rows].copy_(positions)
        captured.num_real.fill_(num_rows)
        captured.plan.update(metadata)
        captured.graph.replay()
        self._captured[size] = captured
        return captured.logits[:num_rows]

    def _capture(self, size: int, metadata: AttentionMetadata) -> _Captured | None:
        """The graph of a batch size; None, and never again, where that fails."""
        try:
            token_ids, positions = (torch.zeros(size, dtype=torch.int64, device=self._device) for _ in range(2))
            num_real = torch.zeros(1, dtype=torch.int64, device=self._device)  # what is run before counts nothing
            plan, graph = self._new_plan(size), self._new_graph()
            plan.update(metadata)
            logits = graph.capture(lambda: self._run(token_ids, positions, num_real, plan))
        except Exception as error:
            self._has_failed = True
            self._captured.clear()
            logger.warning("a step of %d rows could not be captured (%r): no CUDA graphs from here on", size, error)
            return None
        return _Captured(graph, token_ids, positions, num_real, plan, logits)


def can_capture(decoder: Decoder, attention: AttentionBackend, max_model_len: int) -> bool:
    """Whether a step that only decodes is launches and nothing else, from ids to logits."""
    return (
        decoder.device.type == "cuda"
        and decoder.dispatcher.waits_for_nobody
        and attention.decode_plan(1, max_model_len) is not None
    )


def decode_graphs(
    decoder: Decoder, kv_cache: KVCache, attention: AttentionBackend, *, max_num_seqs: int, max_model_len: int
) -> DecodeGraphs:
    """Of a model that can be captured."""
    pool = torch.cuda.graph_pool_handle()
    return DecodeGraphs(
        whole_step(decoder, kv_cache),
        lambda size: _static(attention.decode_plan(size, max_model_len)),
        lambda: CudaGraph(pool),
        max_num_seqs=max_num_seqs,
        device=decoder.device,
    )


def whole_step(decoder: Decoder, kv_cache: KVCache) -> Run:
    """From ids to logits, with experts that nobody waits for."""

    def run(
        token_ids: torch.Tensor, positions: torch.Tensor, num_real: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        layers = decoder.forward(token_ids, positions, plan, kv_cache, num_real=num_real)
        while True:
            try:
                next(layers)
            except StopIteration as finished:
                return decoder.logits(decoder.hidden_states(finished.value))

    return run


def _static(plan: StaticPlan | None) -> StaticPlan:
    assert plan is not None, "attention can be captured"
    return plan
