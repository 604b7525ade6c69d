"""What is told when a request has ended: its line, and, if it failed, a count by reason. Knows no request's content.

Where traces are on, a request that named a model and was refused before it was answered has a span as well: its caller
is known. That load is shed is the operator's matter, so each bound that is reached has a warning of its own, the first
time at once and then at most every WARN_EVERY_S. A limit of the caller's own key is no such bound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cluster.telemetry.traces import Traces
from gateway.telemetry.logs import RequestRecord
from gateway.telemetry.metrics import GatewayMetrics

WARN_EVERY_S = 10.0
SHED = "shed"  # reasons of bounds that are no caller's begin so

logger = logging.getLogger(__name__)


class RequestEnds:
    """One per gateway process."""

    def __init__(
        self,
        metrics: GatewayMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        traces: Traces | None = None,
    ) -> None:
        """Without `metrics`, as in Serve's proxy, nothing is counted."""
        self._metrics = metrics
        self._traces = traces
        self._clock = clock
        self._unsaid: dict[str, int] = {}  # requests since the last warning, by reason
        self._warned_at: dict[str, float] = {}

    def __call__(self, record: RequestRecord, *, is_quiet: bool = False) -> None:
        """`is_quiet`: it has no line."""
        if not is_quiet:
            record.write()
        if not record.reason:
            return
        if self._metrics is not None:
            self._metrics.failures.labels(record.model, record.error, record.reason).inc()
        if self._traces is not None and record.model and record.may_be_traced:
            self._trace_refusal(self._traces, record)
        if record.reason.startswith(SHED):
            self._warn(record)

    @staticmethod
    def _trace_refusal(traces: Traces, record: RequestRecord) -> None:
        attributes = {
            "manta.request_id": record.request_id,
            "manta.door": record.door,
            "gen_ai.request.model": record.model,
        }
        span = traces.start(
            "request", attributes, kind="server", parent=record.traceparent, started_ns=record.started_ns
        )
        span.end({"manta.reason": record.reason}, record.error)

    def _warn(self, record: RequestRecord) -> None:
        reason, now = record.reason, self._clock()
        self._unsaid[reason] = self._unsaid.get(reason, 0) + 1
        if now - self._warned_at.get(reason, float("-inf")) < WARN_EVERY_S:
            return
        figures = {"reason": reason, "requests": self._unsaid.pop(reason), "model": record.model}
        self._warned_at[reason] = now
        logger.warning("load is shed", extra={"figures": {k: v for k, v in figures.items() if v != ""}})
