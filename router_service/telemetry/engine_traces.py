"""The spans of one coordinator: one per request that is traced. Knows no maths.

Where a request asks for it, each step that it is in is a span below the request's, with one below it per group of
layers. For nobody else: steps are many more than requests, and a collector that cannot take them all loses requests.
"""

from __future__ import annotations

import time

from cluster.messages import Key, Request
from cluster.telemetry.layer_times import LayerTimes
from cluster.telemetry.traces import NO_SPAN, Span, Traces
from router_service.scheduling.scheduler import Batch


class EngineTraces:
    """`begin` and `end` are called on the event loop, `observe_step` on the engine's thread."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._asking: dict[Key, Span] = {}  # of requests whose steps are traced, in the order in which they came
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
        if span and request.traces_layers:
            self._asking[request.key] = span
            self.layer_times.wanted = True
        return span

    def end(self, request: Request, span: Span, num_tokens: int, error: BaseException | None) -> None:
        """The stream of the request is over."""
        self._asking.pop(request.key, None)
        self.layer_times.wanted = bool(self._asking)
        span.end({"gen_ai.usage.output_tokens": num_tokens}, type(error).__name__ if error else "")

    def observe_step(self, seconds: float, batch: Batch) -> None:
        """A child of the first request in the batch that asks for it, linked to the others that do."""
        passes = self.layer_times.take()
        if not self._asking:
            return
        keys = {scheduled.sequence.request.key for scheduled in batch}
        first, *others = [span for key, span in list(self._asking.items()) if key in keys] or [NO_SPAN]
        if not first:
            return
        tokens = sum(scheduled.num_tokens for scheduled in batch)
        now_ns, now = time.time_ns(), time.perf_counter()

        def unix_ns(at: float) -> int:
            return now_ns - int((now - at) * 1e9)

        attributes = {"manta.sequences": len(batch), "manta.tokens": tokens}
        began_ns = unix_ns(min([now - seconds, *(one.began for one in passes)]))
        step = self._traces.start("step", attributes, parent=first.traceparent, started_ns=began_ns, links=others)
        for number, one in enumerate(passes):
            for group in one.groups():
                of_layers = {
                    "manta.first_layer": group.first,
                    "manta.last_layer": group.last,
                    "manta.experts_s": group.experts_s,
                    "manta.microbatch": number,
                }
                span = self._traces.start("layers", of_layers, parent=step.traceparent, started_ns=unix_ns(group.began))
                span.end({}, ended_ns=unix_ns(group.ended))
        step.end({})

    def close(self) -> None:
        self._traces.close()
