"""The spans of one coordinator: one per request that is traced, one per step that works on any. Knows no maths."""

from __future__ import annotations

import time

from cluster.messages import Request
from cluster.telemetry.traces import NO_SPAN, Span, Traces
from router_service.scheduling.scheduler import Batch


class EngineTraces:
    """`begin` and `end` are called on the event loop, `observe_step` on the engine's thread."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._running: dict[tuple[str, int], Span] = {}

    def begin(self, request: Request) -> Span:
        """A child of the gateway's span; none for a request that comes without."""
        if not request.traceparent:
            return NO_SPAN
        span = self._traces.start(
            "generate",
            {
                "manta.request_id": request.request_id,
                "manta.choice": request.choice_index,
                "manta.resumed_tokens": len(request.output_token_ids),
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            },
            parent=request.traceparent,
        )
        if span:
            self._running[request.key] = span
        return span

    def end(self, request: Request, span: Span, num_tokens: int, error: BaseException | None) -> None:
        """The stream of the request is over."""
        self._running.pop(request.key, None)
        span.end({"gen_ai.usage.output_tokens": num_tokens}, type(error).__name__ if error else "")

    def observe_step(self, seconds: float, batch: Batch) -> None:
        """A trace of its own, linked to the requests in the batch: a step belongs to all of them."""
        if not self._running:
            return
        spans = [span for scheduled in batch if (span := self._running.get(scheduled.sequence.request.key))]
        if spans:
            tokens = sum(scheduled.num_tokens for scheduled in batch)
            started_ns = time.time_ns() - int(seconds * 1e9)
            attributes = {"manta.sequences": len(batch), "manta.tokens": tokens}
            self._traces.start("step", attributes, started_ns=started_ns, links=spans).end({})

    def close(self) -> None:
        self._traces.close()
