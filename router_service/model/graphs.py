"""Decode steps as CUDA graphs: all their launches are one. Knows batch sizes, buffers and replay; knows no sequence.

A graph does the same on the same memory whenever it is replayed. So a batch is padded to the next size for which there
is a graph, and what a step is told is copied to where the graph reads it:

    ids, positions, attention's plan ──▶ copied ──▶ replay ──▶ logits, where the graph leaves them

Where experts are elsewhere a step is a graph for each piece between two dispatches, and the host sends what lies there:

    replay piece 0 │ send, wait │ replay piece 1 │ send, wait │ … │ replay piece L ──▶ logits

Rows of padding see the null page, write nothing, and nobody reads what they make. They go to no expert: weights would
be read for nothing. How many rows are real is a number on the device.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from cluster.errors import MantaError
from cluster.planning.step_memory import graph_sizes
from experts_service.device import check_device, is_out_of_memory
from router_service.attention.backend import AttentionBackend, StaticPlan
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata
from router_service.dispatcher import Dispatch
from router_service.model.decoder import Decoder

logger = logging.getLogger(__name__)

STEPS_BETWEEN_TRIES = 4096  # of a size for whose graph memory was short

T = TypeVar("T")


class Graph(Protocol):
    """One recorded run."""

    def capture(self, run: Callable[[], T]) -> T:
        """Record it. Returns what it does: tensors in it lie where every replay leaves them."""

    def replay(self) -> None:
        """Once more, on what lies in the same memory now."""


class CudaGraph:
    """CUDA's own. Those of one pool share memory: what one has freed belongs to those that were captured later."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """`stream`: any but the default one, the same for all of a pool."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool, self._stream = pool, stream

    def capture(self, run: Callable[[], T]) -> T:
        """It has been run before: libraries allocate and kernels are compiled at their first."""
        with torch.cuda.stream(self._stream):
            # Other threads may ask the driver for memory meanwhile, which would end a capture that concerns all.
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # it says that something was wrong before
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        return result

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graphs of one batch size, and the memory that they work on."""

    token_ids: torch.Tensor  # [B]
    positions: torch.Tensor  # [B]
    num_real: torch.Tensor  # [1]
    plan: StaticPlan
    pieces: list[tuple[Graph, Dispatch]]  # each with what is sent behind it
    last: Graph
    logits: torch.Tensor  # [B, V]


class DecodeGraphs:
    """Graphs for each of a few batch sizes."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        new_plan: Callable[[int], StaticPlan],
        new_graph: Callable[[], Graph],
        *,
        max_num_seqs: int,
        block_size: int,
    ) -> None:
        """`new_plan`: for at most so many sequences that decode."""
        self._decoder, self._kv_cache = decoder, kv_cache
        self._new_plan, self._new_graph = new_plan, new_graph
        self._sizes = graph_sizes(max_num_seqs)
        self._nobody = AttentionMetadata([], block_size)
        self._captured: dict[int, _Captured] = {}
        self._steps_until_try: dict[int, int] = {}  # of sizes for whose graphs memory was short
        self._has_failed = False

    @property
    def num_captured(self) -> int:
        """Batch sizes that there are graphs for."""
        return len(self._captured)

    @torch.inference_mode()
    def capture(self) -> None:
        """All sizes, so that no step waits for it. The largest first: what it frees is enough for the others."""
        for size in reversed(self._sizes):
            self._try(size)

    def __call__(
        self,
        token_ids: torch.Tensor,  # [B]
        positions: torch.Tensor,  # [B]
        metadata: AttentionMetadata,
    ) -> torch.Tensor | None:
        """Logits [B, V] of a step in which each sequence gets one token, good until the next. None: run it eagerly.

        Raises ExpertUnavailable, or what replaying raises; in the latter case that graph is not used again.
        """
        num_rows = len(token_ids)
        if num_rows > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        captured = self._captured.get(size) or self._try(size)
        if captured is None:
            return None
        try:
            captured.token_ids[:num_rows].copy_(token_ids)
            captured.positions[:num_rows].copy_(positions)
            captured.num_real.fill_(num_rows)
            captured.plan.update(metadata)
            for graph, dispatch in captured.pieces:
                graph.replay()
                self._decoder.dispatcher.exchange(dispatch, num_rows)
            captured.last.replay()
        except MantaError:  # of experts elsewhere
            raise
        except BaseException:
            self._captured.pop(size, None)
            raise
        return captured.logits[:num_rows]

    def _try(self, size: int) -> _Captured | None:
        """The graphs of a batch size, captured now; None where that fails. Raises where the device is gone.

        Where memory is short, another time may be better, and other sizes are smaller. Else none is tried again.
        """
        if self._has_failed:
            return None
        if self._steps_until_try.get(size, 0) > 0:
            self._steps_until_try[size] -= 1
            return None
        try:
            captured = self._captured[size] = self._capture(size)
        except Exception as error:
            self._note_failure(size, error)
            check_device(self._decoder.device)
            return None
        return captured

    def _note_failure(self, size: int, error: Exception) -> None:
        """One warning for a size."""
        if not is_out_of_memory(error):
            self._has_failed = True
            self._captured.clear()
            logger.warning("a step of %d rows could not be captured (%r): no CUDA graphs from here on", size, error)
            return
        if size not in self._steps_until_try:
            logger.warning(
                "memory was short to capture a step of %d rows: such steps are slower, their launches one by one", size
            )
        self._steps_until_try[size] = STEPS_BETWEEN_TRIES

    def _capture(self, size: int) -> _Captured:
        """Of rows that are all padding."""
        device = self._decoder.device
        token_ids, positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        num_real = torch.zeros(1, dtype=torch.int64, device=device)
        plan = self._new_plan(size)
        plan.update(self._nobody)
        step = _Pieces(lambda: self._step(token_ids, positions, num_real, plan))
        reached = step.first()
        while not isinstance(reached, torch.Tensor):
            reached = step.next()
        pieces: list[tuple[Graph, Dispatch]] = []
        while True:
            graph = self._new_graph()
            reached = graph.capture(step.next if pieces else step.first)
            if isinstance(reached, torch.Tensor):
                return _Captured(token_ids, positions, num_real, plan, pieces, graph, reached)
            pieces.append((graph, reached))

    def _step(
        self, token_ids: torch.Tensor, positions: torch.Tensor, num_real: torch.Tensor, plan: StaticPlan
    ) -> Generator[Dispatch, None, torch.Tensor]:
        """From ids to logits."""
        decoder = self._decoder
        x = yield from decoder.forward(token_ids, positions, plan, self._kv_cache, num_real=num_real)
        return decoder.logits(decoder.hidden_states(x))


class _Pieces:
    """A step that can be run again and again, a piece at a time."""

    def __init__(self, begin: Callable[[], Generator[Dispatch, None, torch.Tensor]]) -> None:
        self._begin = begin
        self._step = begin()

    def first(self) -> Dispatch | torch.Tensor:
        """From the start to where something is left to be sent, or to the logits [B, V]."""
        self._step = self._begin()
        return self.next()

    def next(self) -> Dispatch | torch.Tensor:
        """From there to the next."""
        try:
            while True:
                dispatch = next(self._step)
                if dispatch.exchange is not None:
                    return dispatch
        except StopIteration as finished:
            logits: torch.Tensor = finished.value
            return logits


def can_capture(decoder: Decoder, attention: AttentionBackend, max_model_len: int) -> bool:
    """Whether a step that only decodes is launches and nothing else, but where experts elsewhere are asked."""
    return (
        decoder.device.type == "cuda"
        and decoder.dispatcher.can_be_captured
        and attention.decode_plan(1, max_model_len) is not None
    )


def decode_graphs(
    decoder: Decoder,
    kv_cache: KVCache,
    attention: AttentionBackend,
    *,
    max_num_seqs: int,
    block_size: int,
    max_model_len: int,
) -> DecodeGraphs:
    """Of a model that can be captured."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(decoder.device)
    return DecodeGraphs(
        decoder,
        kv_cache,
        lambda size: _static(attention.decode_plan(size, max_model_len)),
        lambda: CudaGraph(pool, stream),
        max_num_seqs=max_num_seqs,
        block_size=block_size,
    )


def _static(plan: StaticPlan | None) -> StaticPlan:
    assert plan is not None, "attention can be captured"
    return plan
