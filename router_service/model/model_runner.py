"""Turns a scheduled batch into tensors, runs the decoder over it, and hands back logits. Chooses nothing.

The batch is cut into microbatches whose forward passes are driven in turn: while one waits for its experts, the next
computes its attention. Each microbatch reads the weights again, so more than one pays only where coordinator and
experts have hardware of their own.

Shapes: T tokens of a microbatch, B sequences that get a new token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from experts_service.device import HostCopy, upload
from router_service.attention.backend import AttentionBackend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.dispatcher import Dispatch
from router_service.model.decoder import Decoder
from router_service.model.graphs import DecodeGraphs
from router_service.outputs.logprobs import rows_to_score, score_prompts
from router_service.outputs.pooling import pool_prompts, rows_to_pool
from router_service.outputs.routed_experts import RoutedExperts
from router_service.scheduling.scheduler import Batch
from router_service.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from router_service.model.transformers_backend.decoder import TransformersDecoder

    AnyDecoder = Decoder | TransformersDecoder


class StepOutput(NamedTuple):
    """What the model makes of a batch."""

    logits: torch.Tensor  # [B, V] in fp32, one row per scheduled sequence with `samples`, in order
    # Waits for what else was launched, and books it: scores of prompts, experts. To be called once. Returns whose
    # values are NaN or infinite: nothing that was computed for them can be used. Raises what the device raised.
    land: Callable[[], list[Sequence]]


class ModelRunner:
    """One decoder, its KV cache and how it attends to that."""

    def __init__(
        self,
        decoder: AnyDecoder,
        kv_cache: KVCache,
        attention: AttentionBackend,
        *,
        block_size: int,
        num_microbatches: int = 1,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.attention = attention
        self.block_size = block_size
        self.num_microbatches = num_microbatches
        self.graphs = graphs
        self.pending: torch.Tensor | None = None  # ids that the host has not read; sequences know their rows

    @property
    def kernels(self) -> dict[str, str]:
        """Which of the kernels run here, by what they compute."""
        return {"attention": self.attention.name, "linear": str(self.decoder.kernel)}

    @torch.inference_mode()
    def forward(self, batch: Batch) -> StepOutput:
        """Compute the scheduled tokens. Prompts that ask for it are scored or pooled.

        Raises ExpertUnavailable when the experts cannot be reached in time. The same batch, or a part of it, may be
        computed again whatever was raised.
        """
        microbatches = split(batch, self.num_microbatches)
        outputs: list[StepOutput | None] = [None] * len(microbatches)
        passes = list(enumerate(map(self._forward, microbatches)))
        with ExitStack() as stack:
            for _, forward in passes:
                stack.callback(forward.close)  # one that failed leaves the others where they wait for experts
            while passes:
                unfinished = []
                for index, forward in passes:
                    try:
                        next(forward)
                        unfinished.append((index, forward))
                    except StopIteration as finished:
                        outputs[index] = finished.value
                passes = unfinished
        done = [output for output in outputs if output is not None]
        return StepOutput(
            done[0].logits if len(done) == 1 else torch.cat([output.logits for output in done]),
            lambda: [sequence for output in done for sequence in output.land()],
        )

    def _forward(self, batch: Batch) -> Generator[Dispatch, None, StepOutput]:
        """The forward pass of one microbatch."""
        device = self.decoder.device
        token_ids: list[int] = []
        sampled_rows: list[int] = []
        scored_rows: list[int] = []
        scored: list[tuple[Sequence, int]] = []  # whose row it is, and its position
        pooled_rows: list[int] = []
        pooled: list[tuple[Sequence, range]] = []  # whose rows they are, and their positions
        pending_rows: list[int] = []  # whose ids the host has not read,
        pending_from: list[int] = []  # and which of the last step's tokens they are
        spans: list[Span] = []
        for scheduled in batch:
            end = scheduled.start + scheduled.num_tokens
            for position in rows_to_score(scheduled.sequence, scheduled.start, end):
                scored_rows.append(len(token_ids) + position - scheduled.start)
                scored.append((scheduled.sequence, position))
            token_ids += scheduled.sequence.token_ids[scheduled.start : end]
            if scheduled.sequence.pending_row is not None:
                pending_rows.append(len(token_ids))
                pending_from.append(scheduled.sequence.pending_row)
                token_ids.append(0)
            spans.append(Span(scheduled.start, scheduled.num_tokens, scheduled.sequence.block_table))
            if pooled_positions := rows_to_pool(scheduled.sequence, scheduled.start, end):
                first = len(token_ids) - end
                pooled_rows += range(first + pooled_positions.start, first + pooled_positions.stop)
                pooled.append((scheduled.sequence, pooled_positions))
            if scheduled.samples:
                sampled_rows.append(len(token_ids) - 1)
        routed = RoutedExperts(batch)
        metadata = AttentionMetadata(spans, self.block_size)
        ids, positions, wanted_rows, to, of = upload(
            [
                np.array(token_ids),
                metadata.positions,
                np.array(sampled_rows + scored_rows + pooled_rows, np.int64),
                np.array(pending_rows, np.int64),
                np.array(pending_from, np.int64),
            ],
            device,
        )
        if self.pending is not None and pending_rows:
            ids.index_copy_(0, to, self.pending.index_select(0, of))
        only_decodes = len(sampled_rows) == len(batch) == len(token_ids)
        if self.graphs is not None and only_decodes and not routed and not scored:
            logits = self.graphs(ids, positions, metadata)
            if logits is not None:
                return StepOutput(logits, list)  # which say what is not finite
        x = yield from self.decoder.forward(
            ids,
            positions,
            self.attention.plan(metadata),
            self.kv_cache,
            routed.layers if routed else None,
        )
        if routed:
            routed.launch()
        hidden = self.decoder.hidden_states(x[wanted_rows])
        of_sampled, of_scored, of_pooled = hidden.split([len(sampled_rows), len(scored_rows), len(pooled_rows)])
        book_scores = score_prompts(of_scored, scored, self.decoder.logits)
        pool_prompts(of_pooled, pooled)
        logits_tell = device.type != "cpu" and len(sampled_rows) == len(token_ids)  # what is not finite
        not_finite = list if logits_tell else _not_finite(x, batch)

        def land() -> list[Sequence]:
            if routed:
                routed.tell()
            return book_scores() + not_finite()

        return StepOutput(self.decoder.logits(of_sampled), land)


def _not_finite(x: torch.Tensor, batch: Batch) -> Callable[[], list[Sequence]]:
    """Looks at `x` [T, D]; what is returned waits for that, and says for which sequences a row is not finite."""
    if x.is_cpu and math.isfinite(x.sum()):
        return list
    finite = HostCopy(x.sum(dim=-1, dtype=torch.float32).isfinite())  # [T]; in fp16 a sum may be too large
    return lambda: _lost(finite.wait().tolist(), batch)


def _lost(finite: list[bool], batch: Batch) -> list[Sequence]:
    """The sequences one of whose rows is not finite."""
    lost = []
    first = 0
    for scheduled in batch:
        if not all(finite[first : first + scheduled.num_tokens]):
            lost.append(scheduled.sequence)
        first += scheduled.num_tokens
    return lost


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """At most `num_parts` runs of consecutive sequences, of about as many tokens each; none is empty."""
    parts: list[Batch] = []
    total = sum(scheduled.num_tokens for scheduled in batch)
    part: Batch = []
    taken = 0
    for scheduled in batch:
        part.append(scheduled)
        taken += scheduled.num_tokens
        if taken * num_parts >= total * (len(parts) + 1):
            parts.append(part)
            part = []
    return parts
