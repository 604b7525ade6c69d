"""The spans of one coordinator: one per request that is traced, one per step that works on any. Knows no maths.

Where a request asks for it, each step that it is in has children, one per group of layers.
"""

from __future__ import annotations

import time

from cluster.messages import Request
from cluster.telemetry.layer_times import LayerTimes
from cluster.telemetry.traces import NO_SPAN, Span, Traces
from router_service.scheduling.scheduler import Batch


class EngineTraces:
    """`begin` and `end` are called on the event loop, `observe_step` on the engine's thread."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._running: dict[tuple[str, int], Span] = {}
        self._with_layers: set[tuple[str, int]] = set()  # those of them that ask for layers
        self.layer_times = LayerTimes()  # the decoder's

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
            if request.traces_layers:
                self._with_layers.add(request.key)
                self.layer_times.wanted = True
        return span

    def end(self, request: Request, span: Span, num_tokens: int, error: BaseException | None) -> None:
        """The stream of the request is over."""
        self._running.pop(request.key, None)
        self._with_layers.discard(request.key)
        self.layer_times.wanted = bool(self._with_layers)
        span.end({"gen_ai.usage.output_tokens": num_tokens}, type(error).__name__ if error else "")

    def observe_step(self, seconds: float, batch: Batch) -> None:
        """A trace of its own, linked to the requests in the batch: a step belongs to all of them."""
        passes = self.layer_times.take()
        if not self._running:
            return
        keys = [scheduled.sequence.request.key for scheduled in batch]
        spans = [span for key in keys if (span := self._running.get(key))]
        if not spans:
            return
        tokens = sum(scheduled.num_tokens for scheduled in batch)
        now_ns, now = time.time_ns(), time.perf_counter()

        def unix_ns(at: float) -> int:
            return now_ns - int((now - at) * 1e9)

        attributes = {"manta.sequences": len(batch), "manta.tokens": tokens}
        began = min([now - seconds, *(one.began for one in passes)])
        step = self._traces.start("step", attributes, started_ns=unix_ns(began), links=spans)
        if not self._with_layers.isdisjoint(keys):
            for number, one in enumerate(passes):
                for group in one.groups():
                    of_layers = {
                        "manta.first_layer": group.first,
                        "manta.last_layer": group.last,
                        "manta.experts_s": group.experts_s,
                        "manta.microbatch": number,
                    }
                    began_ns = unix_ns(group.began)
                    span = self._traces.start("layers", of_layers, parent=step.traceparent, started_ns=began_ns)
                    span.end({}, ended_ns=unix_ns(group.ended))
        step.end({})

    def close(self) -> None:
        self._traces.close()
